"""The codec: the VAE that turns images into latents.

Method: arXiv 2512.14421, section on latents; ``input_range`` and posterior mean as explained in
the README ("What differs from the paper").
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from lcmem_cli.engine.documents import FileName
from lcmem_cli.engine.errors import CheckpointError, InputError

EMBEDDED = "embedded"
PIXELS = "none"
CODEC_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """What a codec is and how it is fed; recorded beside everything made with it.

    The bounds are checked where a spec is read from a file.

    Attributes:
        name: ``embedded``, ``none`` (pixels), a folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        class_name: diffusers class, or ``Pixels``.
        input_range: ``symmetric`` feeds [-1, 1], ``unit`` feeds [0, 1].
        posterior: ``mean`` or ``sample``.
        latent_channels: channels C of a latent.
        downsampling: image side divided by latent side.
        weights_hash: SHA-256 over class and weights of the encoder.
    """

    name: FileName
    revision: str | None
    class_name: str
    input_range: Literal["symmetric", "unit"]
    posterior: Literal["mean", "sample"]
    latent_channels: Annotated[int, Field(ge=1, le=4096)]
    downsampling: Annotated[int, Field(ge=1, le=4096)]
    weights_hash: str

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"{self.name} ({self.class_name}, f{self.downsampling}, {self.latent_channels} "
            f"channels, {self.input_range}, {self.posterior}, {self.weights_hash[:12]})"
        )


class Codec:
    """A frozen VAE encoder in evaluation mode.

    Args:
        model: a diffusers ``AutoencoderKL`` or ``AutoencoderTiny``, or ``None`` for pixels.
        name: recorded in the spec.
        revision: recorded in the spec.
        input_range: see ``CodecSpec``.
        posterior: see ``CodecSpec``.
        device: torch device.

    Attributes:
        encoder: the module that ``forward`` runs, which shares its weights with ``model``.
    """

    def __init__(
        self,
        model: torch.nn.Module | None,
        *,
        name: str,
        revision: str | None = None,
        input_range: Literal["symmetric", "unit"] = "symmetric",
        posterior: Literal["mean", "sample"] = "mean",
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        if model is None:
            channels, factor, class_name, digest = 3, 1, "Pixels", "pixels"
            input_range = "unit"
        else:
            class_name = type(model).__name__
            if class_name not in CODEC_CLASSES:
                raise CheckpointError(
                    f"codec {name}: {class_name} is not one of {', '.join(CODEC_CLASSES)}"
                )
            model.eval().requires_grad_(False).to(device)
            config: Any = model.config
            channels = int(config.latent_channels)
            factor = 2 ** (len(_block_widths(model)) - 1)
            digest = hash_encoder(model)
        self.encoder = model
        if model is not None and class_name == "AutoencoderKL" and posterior == "mean":
            self.encoder = _mean_encoder(model)
        self.spec = CodecSpec(
            name=name,
            revision=revision,
            class_name=class_name,
            input_range=input_range,
            posterior=posterior if class_name == "AutoencoderKL" else "mean",
            latent_channels=channels,
            downsampling=factor,
            weights_hash=digest,
        )

    @torch.inference_mode()
    def encode(
        self,
        images: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        together: int = 1,
    ) -> torch.Tensor:
        """Encode images to raw latents (no scaling factor, no normalisation).

        Args:
            images: ``[B, 3, H, W]`` float32 in [0, 1]; H and W divisible by the downsampling.
            generator: needed for, and only used by, ``posterior="sample"``.
            together: images in one call of the VAE on a CPU. One at a time an image's latent is
                the same to the last bit in any batch, as stored latents should be; several at a
                time are faster, and rounding then depends on the batch.

        Returns:
            ``[B, C, H / f, W / f]`` float32 on the codec's device.

        Raises:
            InputError: the sides are not divisible by the downsampling.
        """
        self.check_sides(images.shape[-2], images.shape[-1])
        images = images.to(self.device, torch.float32)
        if self.model is None:
            return images
        if not len(images):
            return self._empty(images)
        if self.device.type != "cpu":
            return self.forward(images, generator=generator)
        pieces = torch.split(images, together)
        return torch.cat([self.forward(piece, generator=generator) for piece in pieces])

    def check_sides(self, height: int, width: int) -> None:
        """Check the sides of an image in pixels.

        Raises:
            InputError: they are not divisible by the downsampling.
        """
        factor = self.spec.downsampling
        if height % factor or width % factor:
            raise InputError(
                f"image side {height, width} is not divisible by the codec's downsampling "
                f"{factor}; choose another image size"
            )

    def _empty(self, images: torch.Tensor) -> torch.Tensor:
        height, width = (side // self.spec.downsampling for side in images.shape[-2:])
        return images.new_zeros(0, self.spec.latent_channels, height, width)

    def forward(
        self, images: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Encode a batch in one call, without the checks of ``encode``; this can be traced.

        Args:
            images: ``[B, 3, H, W]`` float32 in [0, 1] on the codec's device.
            generator: see ``encode``.

        Returns:
            ``[B, C, H / f, W / f]`` float32.
        """
        if self.model is None:
            return images
        if self.spec.input_range == "symmetric":
            images = images * 2 - 1
        # Not channels last: torch's group normalisation then sums less exactly, by as much as 1e-4
        # in features, and by the number of threads.
        images = images.contiguous()
        model: Any = self.model
        if self.spec.class_name == "AutoencoderTiny":
            latents = model.encode(images).latents
        elif self.spec.posterior == "sample":
            latents = model.encode(images).latent_dist.sample(generator=generator)
        else:
            assert self.encoder is not None
            latents = self.encoder(images)
        result: torch.Tensor = latents.to(torch.float32).contiguous()
        return result

    def activation_bytes(self, size: int) -> int:
        """Return the size of the widest map that an image of ``size`` pixels becomes on its way."""
        if self.model is None:
            return 0
        widths = _block_widths(self.model)
        return max(4 * width * (size >> level) ** 2 for level, width in enumerate(widths))

    def encoder_state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that encoding needs (decoder left out), by their diffusers names."""
        assert self.model is not None
        return {
            key: value.detach().cpu().contiguous()
            for key, value in self.model.state_dict().items()
            if key.startswith(("encoder.", "quant_conv."))
        }

    def model_config(self) -> dict[str, Any]:
        """Return the diffusers config, without private keys."""
        assert self.model is not None
        config: Any = self.model.config
        return {k: v for k, v in dict(config).items() if not k.startswith("_")}


def build_model(class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    """Build an autoencoder with random weights from a diffusers config.

    Raises:
        CheckpointError: the class or the config is not usable.
    """
    import diffusers

    if class_name not in CODEC_CLASSES:
        raise CheckpointError(
            f"codec class '{class_name}' is not one of {', '.join(CODEC_CLASSES)}"
        )
    try:
        model: torch.nn.Module = getattr(diffusers, class_name).from_config(config)
    except Exception as error:  # diffusers checks little, so a bad config fails anywhere
        raise CheckpointError(f"codec config does not describe a {class_name}: {error}") from error
    return model


@torch.no_grad()
def _mean_encoder(model: Any) -> torch.nn.Module:
    """Return the encoder of a KL autoencoder with a last layer that gives the mean alone.

    Its last convolution, the 1 x 1 convolution that may follow, and the choice of the first half of
    the channels are linear, and become one convolution; the deviation is not computed. The embedded
    codec then takes 0.84 of the time on one CPU core.
    """
    last = model.encoder.conv_out
    weight, bias = last.weight.cpu().double(), last.bias.cpu().double()  # not every device has it
    if model.quant_conv is not None:
        mixing = model.quant_conv.weight.cpu().double().flatten(1)
        weight = torch.einsum("om,mihw->oihw", mixing, weight)
        bias = mixing @ bias + model.quant_conv.bias.cpu().double()
    count = len(weight) // 2
    mean = torch.nn.Conv2d(
        last.in_channels, count, last.kernel_size, padding=last.padding, device=last.weight.device
    )
    mean.weight.copy_(weight[:count].float())
    mean.bias.copy_(bias[:count].float())  # type: ignore[union-attr]
    encoder: torch.nn.Module = copy.copy(model.encoder)
    encoder._modules = {**encoder._modules, "conv_out": mean.requires_grad_(False)}
    blocks = list(model.encoder.down_blocks)
    if _JoinedStem.fits(model.encoder.conv_in, blocks[0]):
        stem = _JoinedStem(model.encoder.conv_in, blocks[0].downsamplers[0])
        encoder._modules["conv_in"] = stem.requires_grad_(False)
        encoder._modules["down_blocks"] = torch.nn.ModuleList(blocks[1:])
    return encoder


class _JoinedStem(torch.nn.Module):
    """The first convolution, and the downsampling that follows on it at once, as one.

    Both are linear, so together they are one convolution of the image, which has three channels
    where the maps between have many: the embedded codec takes 0.70 of the time on one CPU core.
    But the downsampling pads the maps by a row and a column of zeros, where the joined convolution
    sees what the first would make of the padded image. So the last row and column of the result
    are computed by both, one after the other.

    Args:
        first: 3 x 3, padded by 1.
        downsample: of diffusers: 3 x 3, stride 2, padded at the right and the bottom.
    """

    def __init__(self, first: torch.nn.Conv2d, downsample: Any) -> None:
        super().__init__()
        self.first, self.downsample = first, downsample
        second = downsample.conv
        convolutions: tuple[Any, Any] = (first, second)
        weights = [conv.weight.cpu().double() for conv in convolutions]
        biases = [conv.bias.cpu().double() for conv in convolutions]
        joined = torch.zeros(second.out_channels, first.in_channels, 5, 5, dtype=torch.float64)
        for y, x in itertools.product(range(3), repeat=2):
            part = torch.einsum("om,mihw->oihw", weights[1][:, :, y, x], weights[0])
            joined[:, :, y : y + 3, x : x + 3] += part
        bias = biases[1] + weights[1].sum(dim=(2, 3)) @ biases[0]
        self.joined = torch.nn.Conv2d(
            first.in_channels, second.out_channels, 5, stride=2, device=first.weight.device
        )
        self.joined.weight.copy_(joined.float())
        self.joined.bias.copy_(bias.float())  # type: ignore[union-attr]

    @staticmethod
    def fits(first: torch.nn.Conv2d, block: Any) -> bool:
        """Return whether a block is nothing but the downsampling that this can take in."""
        if len(block.resnets) or len(getattr(block, "attentions", None) or ()):
            return False
        layers = list(block.downsamplers or ())
        return (
            len(layers) == 1
            and (first.kernel_size, first.padding) == ((3, 3), (1, 1))
            and first.bias is not None
            and (layers[0].use_conv, layers[0].padding, layers[0].norm) == (True, 0, None)
            and (layers[0].conv.kernel_size, layers[0].conv.stride) == ((3, 3), (2, 2))
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return maps ``[B, c, H / 2, W / 2]`` of images ``[B, 3, H, W]`` with even sides."""
        if min(images.shape[-2:]) < 4:
            maps: torch.Tensor = self.downsample(self.first(images))
            return maps
        inner = self.joined(F.pad(images, (1, 2, 1, 2)))
        row = self.downsample(self.first(images[:, :, -3:])[:, :, 1:])
        column = self.downsample(self.first(images[..., -3:])[..., 1:])
        above = torch.cat([inner[:, :, :-1, :-1], column[:, :, :-1]], dim=3)
        return torch.cat([above, row], dim=2)


def _block_widths(model: torch.nn.Module) -> list[int]:
    """Return the channels of an encoder's blocks, each at half the side of the one before."""
    config: Any = model.config
    is_kl = type(model).__name__ == "AutoencoderKL"
    return list(config.block_out_channels if is_kl else config.encoder_block_out_channels)


def hash_encoder(model: torch.nn.Module) -> str:
    """Hash the encoder's weights: two codecs with equal hashes make equal latents."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for key, value in sorted(model.state_dict().items()):
        if key.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
