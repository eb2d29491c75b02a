"""What a TorchScript file may do.

Such a file is a program, and torch's interpreter has operators that read and write files. Loading
one runs code, too: the defaults of arguments, and methods named ``__setstate__``. So three things
hold before anything of a file runs. Its archive is read here and packed anew, so that torch reads
what was checked, whatever its reader makes of odd archives. Its source is parsed, refused where
loading would run it, and written anew from what was parsed. And once it is loaded, each operator of
each method must be in a list of those that compute and do nothing else.
"""

from __future__ import annotations

import ast
import io
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any

from lcmem_cli.engine.errors import CheckpointError, first_line

_ROOM = 64 << 20
"""Bytes that the entries of an archive may take beyond twice its size; code is packed, weights are
not."""
_RUN_WHILE_LOADING = "__setstate__"
_CLASSES_IN_C = "torch.classes"
_PICKLE_OPCODES_REFUSED = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
_REMEDY = "export the network to ONNX instead, whose files hold no program"

PURE = frozenset(
    # tensors to tensors
    """
    abs acos adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d add addcdiv addcmul addmm alias all amax amin any arange argmax argmin
    argsort asin atan atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli bmm
    broadcast_to bucketize cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clone
    complex concat concatenate constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d convolution copy cos cosh cosine_similarity cross cummax cumprod cumsum detach
    diag diagonal diff div divide dot dropout einsum elu embedding empty empty_like eq erf erfc exp
    expand expand_as expm1 eye feature_dropout fft_fft2 fft_ifft2 fft_irfft2 fft_rfft2 fill flatten
    flip floor floor_divide fmod frac full full_like gather ge gelu glu greater grid_sampler
    grid_sampler_2d group_norm gt hardshrink hardsigmoid hardswish hardtanh hstack im2col imag index
    index_put index_select instance_norm interpolate inverse isfinite isinf isnan kthvalue
    layer_norm le leaky_relu lerp less linalg_norm linalg_vector_norm linear linspace log log10
    log1p log2 log_softmax logical_and logical_not logical_or logical_xor logsumexp lt masked_fill
    masked_select matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min
    minimum mish mm movedim mul multiply mv narrow native_batch_norm native_group_norm
    native_layer_norm ne neg new_empty new_full new_ones new_zeros norm normalize numel one_hot ones
    ones_like outer pad permute pixel_shuffle pixel_unshuffle polar pow prelu prod real reciprocal
    reflection_pad1d reflection_pad2d relu relu6 remainder repeat repeat_interleave
    replication_pad2d reshape reshape_as rms_norm roll rot90 round rsqrt rsub
    scaled_dot_product_attention scatter scatter_add select selu sigmoid sign silu sin sinh slice
    softmax softplus softshrink softsign sort split split_with_sizes sqrt square squeeze stack std
    std_mean sub subtract sum swapaxes swapdims t tan tanh tanhshrink tensor_split threshold to topk
    transpose tril triu true_divide type_as unbind unflatten unfold unsafe_chunk unsafe_split
    unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean view view_as
    view_as_complex view_as_real vstack where zero zeros zeros_like _adaptive_avg_pool2d
    _assert_tensor_metadata _convolution _log_softmax _softmax _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d
    """
    # numbers, texts, lists and dictionaries
    """
    append Bool bool clear Complex copy count device dict dim endswith extend find Float float
    FloatImplicit floordiv format get index insert Int int IntImplicit is_floating_point item items
    join keys len list lower neg ord percentFormat pop range replace reverse scalar_tensor
    ScalarImplicit size sorted startswith str stride strip tensor upper values warn __and__
    __contains__ __derive_index __getitem__ __interpolate __is__ __isnot__ __lshift__ __not__ __or__
    __range_length __round_to_zero_floordiv __rshift__ __upsample __xor__ _set_item _tensor_to_list
    _unwrap_optional
    """.split()
)
"""Operators of ``aten`` that compute and do nothing else, without the underscore of those that
write into their first argument. ``bernoulli`` stands in the training branch of dropped paths."""
_PRIM = frozenset(
    """
    abs Constant ConstantChunk CreateObject data device DictConstruct dtype EnumName EnumValue
    GetAttr If is_cuda isinstance itemsize layout ListConstruct ListUnpack Loop max min NumToTensor
    RaiseException requires_grad shape tolist TupleConstruct TupleIndex TupleSlice TupleUnpack
    unchecked_cast unchecked_unwrap_optional Uninitialized
    """.split()
)


def repacked(content: bytes, *, source: str) -> bytes:
    """Check what loading a TorchScript file would run, and return the file packed anew.

    Args:
        content: of the file.
        source: its name in messages.

    Raises:
        CheckpointError: it is something else, is damaged, or would run code when loaded.
    """
    entries = _entries(content, source)
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, data in entries.items():
            if name.endswith(".debug_pkl"):  # which source lines there were, for error messages
                continue
            if name.endswith(".py"):
                data = _checked_source(data, f"{source}: {name}")
            elif name.endswith(".pkl"):
                _check_pickle(data, f"{source}: {name}")
            archive.writestr(name, data)
    return result.getvalue()


def _entries(content: bytes, source: str) -> dict[str, bytes]:
    """Read the archive that ``torch.jit.save`` writes, and refuse everything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            names = {info.filename.lower() for info in infos}  # torch's reader ignores the case
            if len(names) != len(infos):
                raise CheckpointError(
                    f"{source}: holds two entries of one name: it was tampered with"
                )
            if sum(info.file_size for info in infos) > 2 * len(content) + _ROOM:
                raise CheckpointError(f"{source}: unpacks to far more than its size")
            entries = {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{source}: not TorchScript (an archive made by torch.jit.save). If it is a pickle, "
            "loading it would execute code from the file; export the network with torch.jit.trace"
        ) from error
    below = [name.partition("/")[2] for name in entries]
    if "constants.pkl" not in below or not any(name.startswith("code/") for name in below):
        raise CheckpointError(
            f"{source}: a file of torch.save, not TorchScript: it holds weights but no network. "
            "Weights of a timm model: timm:NAME?weights=FILE; others: export the network with "
            "torch.jit.trace"
        )
    return entries


def _checked_source(data: bytes, source: str) -> bytes:
    """Return source that means the same, of which loading runs nothing."""
    try:
        tree = ast.parse(data)
        text = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{source}: cannot be read ({first_line(error)}); {_REMEDY}"
        ) from error
    for node in _outside_of_bodies(tree):
        if isinstance(node, ast.Call):
            raise CheckpointError(
                f"{source}, line {node.lineno}: {ast.unparse(node)[:80]} would run while the file "
                f"is loaded; {_REMEDY}"
            )
        if isinstance(node, ast.FunctionDef) and node.name == _RUN_WHILE_LOADING:
            raise CheckpointError(
                f"{source}, line {node.lineno}: {node.name} would run while the file is loaded; "
                f"{_REMEDY}"
            )
    if _CLASSES_IN_C in text:
        raise CheckpointError(
            f"{source}: uses a class written in C++, which is not known; {_REMEDY}"
        )
    return f"{text}\n".encode()


def _outside_of_bodies(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what loading looks at: everything but the statements inside functions."""
    yield node
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.FunctionDef) and name == "body":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _outside_of_bodies(child)


def _check_pickle(data: bytes, source: str) -> None:
    """Refuse objects of C++ classes; those of the file's own classes are only filled in."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _PICKLE_OPCODES_REFUSED:
                raise CheckpointError(f"{source}: holds {opcode.name}, which torch does not write")
            if opcode.name == "GLOBAL" and _CLASSES_IN_C in str(argument).replace(" ", "."):
                raise CheckpointError(
                    f"{source}: holds a {argument}, which is not known; {_REMEDY}"
                )
    except ValueError as error:
        raise CheckpointError(f"{source}: cannot be read ({first_line(error)})") from error


def check_operators(module: Any, *, source: str) -> None:
    """Refuse a loaded network that has any operator but pure ones; nothing of it is run.

    Args:
        module: of ``torch.jit.load``.
        source: its name in messages.

    Raises:
        CheckpointError: naming the operators.
    """
    import torch

    others = set()
    for part in module.modules():
        script = part._c
        hooks = [*script._get_forward_hooks(), *script._get_forward_pre_hooks()]
        methods = [script._get_method(name) for name in script._method_names()]
        for function in [*methods, *hooks]:
            graph = function.graph.copy()
            torch._C._jit_pass_inline(graph)  # so that calls of other methods are looked into
            others |= {kind for kind in _kinds(graph) if not _is_pure(kind)}
    if others:
        raise CheckpointError(
            f"{source}: not run: the program in it uses {', '.join(sorted(others))}; lcmem runs "
            f"only operators that are known to compute and to do nothing else; {_REMEDY}"
        )


def _kinds(block: Any) -> Iterator[str]:
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _kinds(inner)
        for name in node.attributeNames():
            if node.kindOf(name) in ("g", "gs"):  # graphs as values, run by operators of their own
                yield f"{node.kind()} with a graph"


def _is_pure(kind: str) -> bool:
    namespace, _, name = kind.partition("::")
    if namespace == "prim":
        return name in _PRIM
    return namespace == "aten" and (name in PURE or name.removesuffix("_") in PURE)
