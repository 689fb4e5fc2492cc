"""What an engine was made from, as one key."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CacheError

if TYPE_CHECKING:
    from torch import nn

    from .shape_range import ShapeRange

# Raised when entries of earlier versions must not be read any more.
FORMAT = 1

# Keys below MODEL that say nothing about the network from images to logits. All others count, those of a custom
# backbone too: a needless build does no harm, an engine of another network does.
_NOT_GRAPH = {
    # where it runs, and from which file its weights come, which are digested themselves
    "WEIGHTS",
    "DEVICE",
    "BACKEND",
    "TENSORRT",
    # before and after the network
    "MASK_FORMER.SIZE_DIVISIBILITY",
    "MASK_FORMER.TEST",
    # training
    "MASK_FORMER.CLASS_WEIGHT",
    "MASK_FORMER.DEEP_SUPERVISION",
    "MASK_FORMER.DICE_WEIGHT",
    "MASK_FORMER.IMPORTANCE_SAMPLE_RATIO",
    "MASK_FORMER.MASK_WEIGHT",
    "MASK_FORMER.NO_OBJECT_WEIGHT",
    "MASK_FORMER.OVERSAMPLE_RATIO",
    "MASK_FORMER.TRAIN_NUM_POINTS",
    # detectron2's other models
    "ANCHOR_GENERATOR",
    "KEYPOINT_ON",
    "LOAD_PROPOSALS",
    "MASK_ON",
    "PANOPTIC_FPN",
    "PROPOSAL_GENERATOR",
    "RETINANET",
    "ROI_BOX_CASCADE_HEAD",
    "ROI_BOX_HEAD",
    "ROI_HEADS",
    "ROI_KEYPOINT_HEAD",
    "ROI_MASK_HEAD",
    "RPN",
}

# What of the package mask2former decides the network from images to logits. Post-processing, data and evaluation do not.
NETWORK_SOURCES = ("modeling", "maskformer_model.py", "kernels.py")

# Packages whose versions are ingredients by themselves.
_VERSIONED = {"d2_trt", "detectron2", "mask2former", "torch"}

# Tensors waiting to be hashed are host copies when the model is on a GPU.
_PENDING_BYTES = 256 * 2**20


def graph_config(cfg) -> dict[str, Any]:
    """The part of a config that decides the network from images to logits: MODEL less what says nothing about it."""
    return _without(cfg.MODEL, "")


def _without(node: Mapping, prefix: str) -> dict[str, Any]:
    kept = {}
    for key, value in node.items():
        if prefix + key not in _NOT_GRAPH:
            kept[key] = _without(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return kept


def weights_digest(module: nn.Module) -> str:
    """sha256 of a module's parameters and buffers: names, dtypes, shapes and bytes.

    Buffers outside the state dict, such as the pixel mean, count too. Equal on every device, and with any memory
    layout. Tensors on a GPU are read on the current stream, a few at a time.

    Raises:
        CacheError: a tensor has no data, or none that is a plain array (meta, sparse or quantized tensors).
    """
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    digests: dict[str, str] = {}
    waiting: deque[tuple[str, int, Future]] = deque()
    pending = 0

    def collect() -> int:
        name, size, future = waiting.popleft()
        digests[name] = future.result()
        return size

    # hashlib lets go of the interpreter's lock.
    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="d2_trt-digest") as pool:
        for name, tensor in tensors.items():
            array = tensor_bytes(name, tensor)
            waiting.append((name, array.nbytes, pool.submit(lambda a: hashlib.sha256(a).hexdigest(), array)))
            pending += array.nbytes
            while pending > _PENDING_BYTES:
                pending -= collect()
        while waiting:
            collect()
    return digest([[n, str(tensors[n].dtype), list(tensors[n].shape), digests[n]] for n in sorted(digests)])


def tensor_bytes(name: str, tensor):
    """A tensor's bytes as a NumPy array.

    Args:
        name: what an error calls the tensor.

    Raises:
        CacheError: see weights_digest.
    """
    import torch  # here, so that tools/cache.py's listing does not wait for it

    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.is_quantized:
        raise CacheError(
            f"the weights cannot be digested: {name} is a tensor on {tensor.device} with layout {tensor.layout}"
            f"{', quantized' if tensor.is_quantized else ''}; expected dense weights, loaded."
        )
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).cpu().numpy()


def source_digest(package: str | Path, parts: Sequence[str] = (".",)) -> str:
    """sha256 of a package's Python files: tells builds by edited converters apart, whatever the version says.

    Args:
        package: its folder.
        parts: files of it, and folders with all below them.

    Raises:
        CacheError: a part is missing, or holds no Python files.
    """
    root = Path(package)
    files: set[str] = set()
    for part in parts:
        path = root / part
        found = path.rglob("*.py") if path.is_dir() else [path] if path.is_file() else []
        names = {file.relative_to(root).as_posix() for file in found}
        if not names:
            raise CacheError(f"{path} holds no Python files, so its version cannot be told.")
        files |= names
    return digest([[name, hashlib.sha256((root / name).read_bytes()).hexdigest()] for name in sorted(files)])


def model_sources(model: nn.Module) -> str:
    """sha256 of the files that define the model's classes, and of those that they import: an edited backbone of the user's
    own, or function of its, is another network.

    Those of packages that are ingredients by their versions are left out, and so is what was typed into an interpreter,
    which module_tree describes, and what installed packages import.
    """
    kinds = {cls for kind in {type(module) for module in model.modules()} for cls in kind.__mro__}
    waiting = {cls.__module__ for cls in kinds}
    files: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        seen.add(name := waiting.pop())
        file = _file_of(name)
        if is_versioned(name) or not file.is_file():
            continue
        source = file.read_bytes()
        files[name] = hashlib.sha256(source).hexdigest()
        if not _is_installed(file) and file.suffix == ".py":
            imported = set(_imported(ast.parse(source), sys.modules[name].__package__ or ""))
            waiting |= {n for n in imported - seen if not _is_installed(_file_of(n))}
    return digest(sorted(files.values()))


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """What a module imports when it is imported itself: names of modules, and what may be some."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            base = importlib.util.resolve_name("." * part.level + (part.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in part.names))
        elif not isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _imported(part, package)


def _file_of(module: str) -> Path:
    return Path(getattr(sys.modules.get(module), "__file__", None) or "")


def _is_installed(file: Path) -> bool:
    return bool({"site-packages", "dist-packages"}.intersection(file.parts))


def is_versioned(module: str | None) -> bool:
    """Whether a module is Python's own, or of a package whose version or source is an ingredient by itself."""
    package = str(module).partition(".")[0]
    return package in _VERSIONED or package in sys.stdlib_module_names


def package_version(name: str) -> str:
    """Version of a package with sha256 of its Python files, which an installation from git may change under the same
    version; "not installed" where it is not. The package is not imported."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a file, such as a test's double
        spec = None
    if spec is None or spec.origin is None:
        return "not installed"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "?"
    return f"{version} {source_digest(Path(spec.origin).parent)}"


def key_ingredients(
    *,
    weights: str,
    modules: str,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    shapes: ShapeRange,
    versions: Mapping[str, str],
    plugins: Mapping[str, str],
    tensorrt: str,
    gpu: str,
    compute_capability: Sequence[int],
) -> dict[str, Any]:
    """What an engine's key is made from, in readable form.

    Args:
        weights: of weights_digest.
        modules: of NetworkDigest.modules_digest.
        config: of graph_config.
        options: of TensorRTOptions.graph_key.
        shapes: what the engine is built for.
        versions: of the packages that decide the graph, such as {"d2_trt": ..., "detectron2": ...}; source_digest
            may be one of them.
        plugins: what computes what, with versions: of plugin.identities.
        tensorrt: its full version.
        gpu, compute_capability: as torch.cuda.get_device_name and get_device_capability give them.
    """
    return {
        "format": FORMAT,
        "weights": weights,
        "modules": modules,
        "config": config,
        "options": options,
        "shapes": shapes.to_json(),
        "versions": versions,
        "plugins": plugins,
        "tensorrt": tensorrt,
        "gpu": gpu,
        "compute_capability": ".".join(map(str, compute_capability)),
    }


def canonical(value: Any) -> str:
    """JSON in one spelling: equal values give equal strings.

    Raises:
        CacheError: a value is not JSON's (an object, NaN, an infinity).
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"not to be written as JSON: {error}. Allowed: None, bools, finite numbers, strings, lists, dicts."
        ) from error


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
