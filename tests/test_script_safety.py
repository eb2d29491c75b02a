"""A TorchScript file computes features and does nothing else, neither when loaded nor when run."""

import io
import json
import zipfile

import pytest
import timm
import torch

from lcmem_cli.engine.detectors import script_safety
from lcmem_cli.engine.detectors.registry import load_detector
from lcmem_cli.engine.errors import CheckpointError


class Writes(torch.nn.Module):
    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.target)
        return x.mean((2, 3))


class Reads(torch.nn.Module):
    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + torch.from_file(self.target, False, 3)


class InABranch(torch.nn.Module):
    def __init__(self, target: str) -> None:
        super().__init__()
        self.inner = Writes(target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            if x.shape[0] > 1000:
                x = self.inner(x)
        return x.mean((2, 3))


class WhenLoaded(torch.nn.Module):
    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target, self.training = state
        torch.save(1, self.target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Counts(torch.nn.Module):
    """Its scores depend on what it has seen before."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x.mean((2, 3)) * self.seen


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor, factor: int = 3, offset: float = -0.5) -> torch.Tensor:
        return x.mean((2, 3)) * factor + offset


def archive_of(module):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


def edited(content, change):
    """Return an archive of which ``change(name, data)`` returned each entry's content."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return result.getvalue()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Writes, r"aten::save"), (Reads, r"aten::from_file"), (InABranch, r"aten::save"),
        (WhenLoaded, "__setstate__ would run while the file is loaded"),
        (Counts, r"prim::SetAttr"),
    ],
)  # fmt: skip
def test_a_file_that_does_more_than_compute_is_refused(tmp_path, run_cli, kind, reason):
    target, path = tmp_path / "target", tmp_path / "net.pt"
    path.write_bytes(archive_of(kind(str(target))))
    target.write_bytes(b"kept as it is")
    name = f"torchscript:{path}?size=8"
    with pytest.raises(CheckpointError, match=reason):
        load_detector(name, device="cpu")
    found = json.loads(run_cli("check", "--detectors", name, "--json", exit_code=2).stdout)
    assert "ONNX" in str(found["findings"])
    assert target.read_bytes() == b"kept as it is"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("factor: int=3", 'factor: int=torch.len([torch.save(3, "TARGET")])'),
        (
            "training : bool",
            'training : bool\n  x : Final[int] = torch.len([torch.save(3, "TARGET")])',
        ),
    ],
)
def test_nothing_runs_while_a_file_is_loaded(tmp_path, old, new):
    target, path = tmp_path / "target", tmp_path / "net.pt"

    def change(name, data):
        if not name.endswith(".py"):
            return data
        assert old.encode() in data
        return data.replace(old.encode(), new.replace("TARGET", str(target)).encode())

    path.write_bytes(edited(archive_of(Plain()), change))
    with pytest.raises(CheckpointError, match=r"torch.save.* would run while the file is loaded"):
        load_detector(f"torchscript:{path}?size=8", device="cpu")
    assert not target.exists()


def test_archives_that_two_readers_could_read_otherwise_are_refused(tmp_path):
    path, plain = tmp_path / "net.pt", archive_of(Plain())
    name = f"torchscript:{path}?size=8"
    buffer = io.BytesIO(plain)
    with zipfile.ZipFile(buffer, "a") as archive:
        code = next(each for each in archive.namelist() if each.endswith(".py"))
        archive.writestr(code.upper(), "")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="two entries of one name"):
        load_detector(name)
    buffer = io.BytesIO(plain)
    with zipfile.ZipFile(buffer, "a", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/bomb", bytes(200 << 20))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="unpacks to far more"):
        load_detector(name)

    def foreign(name, data):
        old = f"__torch__.{__name__}\nPlain\n".encode()
        assert not name.endswith("data.pkl") or old in data
        new = b"__torch__.torch\nclasses.quantized.Conv2dPackedParamsBase\n"
        return data.replace(old, new) if name.endswith("data.pkl") else data

    path.write_bytes(edited(plain, foreign))
    with pytest.raises(CheckpointError, match="not known"):
        load_detector(name)
    path.write_bytes(edited(plain, lambda name, data: data[: len(data) // 2]))
    with pytest.raises(CheckpointError):
        load_detector(name)


@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 3, 96, 96))]
)
@pytest.mark.parametrize("backbone", ["resnet10t", "test_convnext"])
def test_usual_networks_pass_and_compute_the_same(backbone, how):
    torch.manual_seed(0)
    model = timm.create_model(backbone, pretrained=False, num_classes=0).eval()
    buffer, images = io.BytesIO(), torch.rand(2, 3, 96, 96)
    torch.jit.save(how(model), buffer)
    checked = script_safety.repacked(buffer.getvalue(), source="net.pt")
    loaded = torch.jit.load(io.BytesIO(checked))
    script_safety.check_operators(loaded, source="net.pt")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images))


def test_defaults_of_arguments_are_kept(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(archive_of(Plain()))
    detector = load_detector(f"torchscript:{path}?size=8&mean=0,0,0&std=1,1,1", device="cpu")
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        torch.from_numpy(detector.embed_batch(images)), images.mean((2, 3)) * 3 - 0.5
    )
