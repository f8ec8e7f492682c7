"""A pretended GPU: the project's commands run on CPU tensors that say they are on cuda:0.

    python tests/pretend_gpu.py [--json FILE] polylora sft --model .. --data .. --out ..

runs one of the project's programs and prints what it did on the device. In Python:

    gpu = pretend_gpu.install()          # before anything is made on the device
    ...
    print(gpu.report())

Every tensor stays an ordinary CPU tensor. Whether it "is" on the GPU is noted on its storage, which
views share. Four things watch over it:

    Functions     what Python sees: device=, .device, .is_cuda, .to, .numpy, .tolist, attention
    Operations    below autograd: mixed devices are an error, as on a GPU; outputs are put on the
                  device of the inputs; kernels, copies, waits of the host and bytes are counted
    Graph         torch.cuda.CUDAGraph: records operations, repeats them on the same tensors, and
                  refuses what a capture may not hold: waits, copies, the host's numbers
    install_..    torch.cuda, torch.distributed (NCCL is gloo) and safetensors say there is a GPU

It cannot show kernels that CUDA lacks or that round differently, streams, real memory, or speed. An
operation counts as one kernel, and so does a function by torch.compile: right for most."""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import safetensors
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
MEMORY = 80 * 2 ** 30                        # bytes that the card claims to have
CAPTURING = "CUDA error: operation not permitted when stream is capturing"

aten = torch.ops.aten
Tensor = torch.Tensor
without_functions = torch._C.DisableTorchFunction


# ---- What the device did -------------------------------------------------------------------------

class Device:
    """Counters of what happened on the pretended device, and its state."""

    def __init__(self):
        self.capturing = False
        self.counting = True
        self.creating = False    # what the current call makes from nothing is on the GPU
        self.backend = None      # of torch.distributed, as it was asked for
        self.kernels = Counter()             # operation -> launches outside graphs
        self.waits = Counter()               # kind -> times the host waited for the device
        self.copies = Counter()              # direction -> copies between host and device
        self.places = Counter()              # "kind file:line" -> waits
        self.attention = Counter()           # (card, kernel) -> calls of attention
        self.slow_attention = Counter()      # file:line -> calls that take the math kernel
        self.live_bytes = 0
        self.peak_bytes = 0
        self.graph_kernels = []              # of each captured graph
        self.replays = 0

    def wait(self, kind):
        """The host waits for the device."""
        if self.capturing:
            raise RuntimeError(f"{CAPTURING} ({kind} at {place()})")
        if self.counting:
            self.waits[kind] += 1
            self.places[f"{kind} {place()}"] += 1

    def copy(self, direction, blocking=True):
        """A copy between host and device; one from pageable memory waits for the stream."""
        if self.capturing:
            raise RuntimeError(f"{CAPTURING} ({direction} at {place()})")
        if self.counting:
            self.copies[direction] += 1
            if blocking:
                self.wait(f"copy {direction}")

    def allocate(self, storage):
        """Count the bytes of a storage until it is freed."""
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        storage.pretend_token = token = Token()
        weakref.finalize(token, self.free, size).atexit = False

    def free(self, size):
        self.live_bytes -= size

    @contextlib.contextmanager
    def uncounted(self):
        before = self.counting
        self.counting = False
        try:
            yield
        finally:
            self.counting = before

    def waits_in(self, file):
        """How often the host waited in lines of this file (a path below the repository)."""
        return sum(n for where, n in self.places.items() if f" {file}:" in where)

    def summary(self):
        """All counters as a dict that json can write."""
        return {"kernels": sum(self.kernels.values()), "waits": sum(self.waits.values()),
                "waits_in_engine": self.waits_in("engine.py"),
                "graphs": len(self.graph_kernels), "replays": self.replays,
                "graph_kernels": self.graph_kernels, "peak_bytes": self.peak_bytes,
                "copies": dict(self.copies), "places": dict(self.places),
                "attention": {" ".join(key): n for key, n in self.attention.items()},
                "slow_attention": dict(self.slow_attention),
                "kernel_names": dict(self.kernels.most_common())}

    def report(self, lines=40):
        """The counters as text, the most frequent places of waits first."""
        s = self.summary()
        text = [f"kernels launched {s['kernels']}, waits of the host {s['waits']}, graphs "
                f"{s['graphs']} of {s['graph_kernels']} kernels, replayed {s['replays']} times, "
                f"peak {s['peak_bytes'] / 2 ** 20:.1f} MiB"]
        text += [f"  {n:6} {where}" for where, n in self.places.most_common(lines)]
        text += [f"  attention {key}: {n}" for key, n in s["attention"].items()]
        text += [f"  MATH KERNEL at {where}: {n}" for where, n in self.slow_attention.items()]
        text.append(f"  most frequent kernels: {self.kernels.most_common(20)}")
        return "\n".join(text)


class Token:
    """Held by a storage, and freed with it."""
    __slots__ = ("__weakref__",)


device = Device()


def place():
    """file:line of the innermost frame within the repository, these lines left out."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}{os.sep}") and path != __file__:
            return f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def on_gpu(tensor):
    with without_functions():
        if tensor.device.type != "cpu":
            return False
        return getattr(tensor.untyped_storage(), "pretend_gpu", False)


def put(tensor, gpu=True):
    """Note on the tensor's storage where it is. Returns the tensor."""
    with without_functions():
        if tensor.device.type != "cpu":      # meta
            return tensor
        storage = tensor.untyped_storage()
        was = getattr(storage, "pretend_gpu", False)
        storage.pretend_gpu = gpu
        if gpu and not was:
            device.allocate(storage)
    return tensor


def tensors_in(*values):
    """All tensors among the values and in lists, tuples and dicts of them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


# ---- Operations: below autograd ------------------------------------------------------------------

# The host waits for these, because a number or a shape depends on the values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
           "unique_consecutive", "equal", "bincount", "is_nonzero", "linalg_eigh", "_linalg_eigh",
           "_linalg_svd", "repeat_interleave.Tensor", "histc", "allclose", "linalg_lu_factor_ex"}
MAY_MIX = {"copy_", "_to_copy", "set_", "lift_fresh", "resize_"}
WITHOUT_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided",
                  "detach", "alias", "_unsafe_view", "lift_fresh", "set_", "_local_scalar_dense"}
ONE_KERNEL = {"rms_norm"}                    # CUDA computes it in one, the CPU in several
INDEXING = {"index", "index_put", "index_put_"}
# CUDA alone has these: products of bf16 with a result in fp32.
FP32_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class Operations(TorchDispatchMode):
    """Checks the devices of each operation's tensors, and counts kernels, copies and waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with without_functions():
            return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func._schema.name.removeprefix("aten::")
        if torch.is_inference_mode_enabled() and name not in ONE_KERNEL and func._can_decompose():
            with self:                       # there a composite operation arrives in one piece
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        inputs = [t for t in tensors_in(args, kwargs) if t.device.type == "cpu"]
        gpu = self.checked_device(name, args, kwargs, inputs)
        if gpu:
            self.note_waits(name, func._schema.overload_name, args, kwargs)
        out = compute(func, args, kwargs)
        before = {t.untyped_storage()._cdata for t in inputs}
        fresh = False
        for t in tensors_in(out):
            if t.device.type == "cpu" and t.untyped_storage()._cdata not in before:
                fresh = True
                put(t, gpu)
        launches = gpu and name not in WITHOUT_KERNEL and (fresh or func._schema.is_mutable)
        if launches and device.counting:
            device.kernels[name] += 1
        return out

    def checked_device(self, name, args, kwargs, inputs):
        """Whether the operation runs on the GPU; an error if its tensors are on both."""
        where = [on_gpu(t) for t in inputs]
        if name.startswith("c10d::") or name in MAY_MIX:
            if name == "copy_" and len(where) == 2 and where[0] != where[1]:
                non_blocking = len(args) > 2 and args[2]
                device.copy("host to device" if where[0] else "device to host", not non_blocking)
            return bool(where) and where[0]
        if any(where) and not all(where):
            self.check_mixed(name, args, inputs, where)
        return any(where) or not inputs and device.creating and not kwargs.get("pin_memory")

    def check_mixed(self, name, args, inputs, where):
        """CUDA takes numbers (0-dim tensors) and indices from the host, and nothing else."""
        strangers = [t for t, gpu in zip(inputs, where) if not gpu]
        if name in INDEXING:
            indices = {id(t) for t in args[1] if t is not None}
            if on_gpu(args[0]) and all(id(t) in indices or t.dim() == 0 for t in strangers):
                device.copy("host to device, an index")
                return
        elif all(t.dim() == 0 for t in strangers):
            return
        shapes = [(tuple(t.shape), "cuda:0" if gpu else "cpu") for t, gpu in zip(inputs, where)]
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, cuda:0 and cpu! ({name} of {shapes} at {place()})")

    def note_waits(self, name, overload, args, kwargs):
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu' "
                               f"({name} at {place()})")
        if name in WAITING or f"{name}.{overload}" in WAITING:
            device.wait(name)
        if name in INDEXING:
            masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
            if masks:
                device.wait("index by bool")


def compute(func, args, kwargs):
    """The operation on the CPU, those that only CUDA has included."""
    name = func._schema.name.removeprefix("aten::")
    if name not in FP32_PRODUCTS or not func._schema.overload_name.startswith("dtype"):
        return func(*args, **kwargs)
    dtype = kwargs.get("out_dtype", args[-1])
    wide = [a.to(dtype) for a in args if isinstance(a, Tensor)]
    scale = {k: v for k, v in kwargs.items() if k in ("alpha", "beta")}
    result = getattr(torch, name)(*wide, **scale)
    return kwargs["out"].copy_(result) if "out" in kwargs else result


# ---- Functions: what Python sees -----------------------------------------------------------------

def wanted(target):
    """True for a GPU, False for the CPU, None for another device (meta)."""
    if isinstance(target, int):
        return True
    return {"cuda": True, "cpu": False}.get(torch.device(target).type)


PROPERTIES = {"device": CUDA, "is_cuda": True, "is_cpu": False}  # of a tensor on the GPU
FROM_NUMBERS = ("tensor", "as_tensor", "asarray", "new_tensor")


def property_name(func):
    """The name of the tensor's property that `func` reads: device, is_cuda, is_cpu; or None."""
    owner = getattr(func, "__self__", None)
    for name in PROPERTIES:
        if owner in (getattr(Tensor, name), getattr(torch._C.TensorBase, name, None)):
            return name
    return None


class Functions(TorchFunctionMode):
    """Answers as a tensor on a GPU would: its device, moves, numpy, tolist, device=."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        before = device.creating
        device.creating = any(map(on_gpu, self.direct_tensors(args, kwargs)))
        try:
            return self.run(func, args, kwargs)
        finally:
            device.creating = before

    def direct_tensors(self, args, kwargs):
        """Tensors among the arguments and in lists among them: no deeper, for speed."""
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Tensor):
                    yield item

    def run(self, func, args, kwargs):
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__":
            asked = property_name(func)
            return PROPERTIES[asked] if asked and on_gpu(first) else func(*args, **kwargs)
        if func is Tensor.backward:
            if "gradient" in kwargs:
                kwargs["grad_tensors"] = kwargs.pop("gradient")
            with self:                       # the backward pass runs Python too
                return torch.autograd.backward(first, *args[1:], **kwargs)
        if first is not None and name in ("to", "cpu", "cuda", "type_as"):
            return self.move(func, name, list(args), kwargs)
        if first is not None and on_gpu(first):
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()"
                                f" to copy the tensor to host memory first. ({place()})")
            if name == "tolist":
                device.wait("tolist")
                with without_functions():
                    return first.detach().tolist()
            if name == "get_device":
                return CUDA.index
            if name == "scaled_dot_product_attention":
                note_attention(args, kwargs)
            if name == "__getitem__" and holds_list(args[1]):
                device.copy("host to device, an index")
            if name == "new_tensor" and kwargs.get("device") is None:
                device.copy("host to device, new")
                return put(func(*args, **kwargs))
        if kwargs.get("device") is not None:
            return self.create(func, name, args, kwargs)
        return func(*args, **kwargs)

    def create(self, func, name, args, kwargs):
        """A call with device=."""
        gpu = wanted(kwargs["device"])
        if gpu is None:
            return func(*args, **kwargs)
        if gpu and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu' "
                               f"({place()})")
        kwargs["device"] = "cpu"
        device.creating = gpu
        out = func(*args, **kwargs)
        if gpu and name in FROM_NUMBERS:
            device.copy("host to device, new")
            if name != "tensor" and not on_gpu(out):
                out = out.clone()            # it may be the caller's own memory
        for tensor in tensors_in(out):
            put(tensor, gpu)
        return out

    def move(self, func, name, args, kwargs):
        """tensor.to(..), .cpu(), .cuda(), .type_as(..)."""
        tensor = args[0]
        if tensor.device.type == "meta":
            return func(*args, **kwargs)
        source = on_gpu(tensor)
        target = source
        if name == "cuda":
            target = True
            func, args, kwargs = Tensor.to, [tensor, "cpu"], {}
        elif name == "cpu":
            target = False
        elif name == "type_as":
            target = on_gpu(args[1])
        elif kwargs.get("device") is not None:
            target = wanted(kwargs["device"])
            kwargs["device"] = "cpu" if target else kwargs["device"]
        elif len(args) > 1 and isinstance(args[1], (str, torch.device, int)):
            target = wanted(args[1])
            args[1] = "cpu" if target else args[1]
        elif len(args) > 1 and isinstance(args[1], Tensor):
            target = on_gpu(args[1])
        out = func(*args, **kwargs)
        if target is None or target == source:
            return out
        with without_functions():
            same = out.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        if same:
            with device.uncounted():
                out = out.clone()
        put(out, target)
        blocking = not (kwargs.get("non_blocking") and target)
        device.copy("host to device" if target else "device to host", blocking)
        return out


def holds_list(index):
    index = index if isinstance(index, tuple) else (index,)
    return any(isinstance(item, (list, range)) for item in index)


def note_attention(args, kwargs):
    """Note which kernel CUDA would take for this attention, by the conditions of torch 2.11 to
    2.13: on Hopper and Blackwell cuDNN first, on Ampere and Ada flash first. cuDNN and flash need
    bf16 or fp16, flash no mask; the efficient kernel needs as many k and v heads as q heads."""
    q, k, v = args[:3]
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    causal = kwargs.get("is_causal", False)
    half = q.dtype in (torch.bfloat16, torch.float16)
    same_heads = q.shape[1] == k.shape[1] == v.shape[1]
    heads = same_heads or kwargs.get("enable_gqa", False) and q.shape[1] % k.shape[1] == 0
    aligned = q.shape[-1] % (8 if half else 4) == 0
    efficient = "efficient" if same_heads and aligned else "math"
    flash = half and mask is None and heads and (not causal or q.shape[2] == k.shape[2])
    cudnn = half and heads and aligned and k.shape[2] > 1
    if not torch.backends.cuda.cudnn_sdp_enabled():
        cudnn = False
    ampere = "flash" if flash else efficient
    hopper = "cudnn" if cudnn else ampere
    device.attention["ampere", ampere] += 1
    device.attention["hopper", hopper] += 1
    if "math" in (ampere, hopper):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        kind = f"{str(q.dtype).removeprefix('torch.')}, mask {mask is not None}"
        device.slow_attention[f"{place()} ({kind}, {shapes})"] += 1


# ---- Graphs --------------------------------------------------------------------------------------

class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph: a capture notes operations and undoes what they wrote; a replay does
    them again on the same tensors, unwatched."""

    def __init__(self, keep_graph=False):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with without_functions():
            return self.note(func, args, kwargs or {})

    def note(self, func, args, kwargs):
        if func._schema.is_mutable:
            with device.uncounted():
                for written in self.written_by(func, args, kwargs):
                    self.undo.append((written, written.clone()))
        if func is aten.lift_fresh.default and on_gpu(args[0]):
            raise RuntimeError(f"{CAPTURING} (numbers of the host at {place()})")
        out = func(*args, **kwargs)
        self.notes.append((func, args, kwargs, out))
        return out

    def written_by(self, func, args, kwargs):
        """The tensors that an operation writes."""
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                yield args[i] if i < len(args) else kwargs[argument.name]

    def pool(self):
        return 0, 1

    def capture_begin(self):
        self.notes = []
        self.undo = []
        self.kernels_before = sum(device.kernels.values())
        device.capturing = True
        super().__enter__()

    def capture_end(self, *error):
        super().__exit__(*(error or (None, None, None)))
        device.capturing = False
        with device.uncounted():
            for written, before in reversed(self.undo):
                written.copy_(before)
        self.undo = []
        self.kernels = sum(device.kernels.values()) - self.kernels_before
        device.graph_kernels.append(self.kernels)

    def replay(self):
        if device.capturing:
            raise RuntimeError(f"{CAPTURING} (a replay at {place()})")
        now = {}                             # id of a noted output -> this replay's
        with without_functions(), _disable_current_modes():
            for func, args, kwargs, out in self.notes:
                again = compute(func, current(args, now), current(kwargs, now))
                for old, new in zip(tensors_in(out), tensors_in(again)):
                    now[id(old)] = new
        device.replays += 1


def current(value, now):
    """A noted argument with this replay's tensors in it."""
    if isinstance(value, Tensor):
        return now.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return type(value)(current(item, now) for item in value)
    if isinstance(value, dict):
        return {name: current(item, now) for name, item in value.items()}
    return value


@contextlib.contextmanager
def graph(tape, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph."""
    device.wait("graph: synchronize")
    tape.capture_begin()
    try:
        yield
    except BaseException:
        tape.capture_end(*sys.exc_info())
        raise
    tape.capture_end()


# ---- Installing ----------------------------------------------------------------------------------

def install():
    """Pretend, from here to the end of the process. Returns the Device."""
    install_cuda(torch.cuda)
    install_safetensors()
    install_distributed()
    # What checkpoint compares is saved below the modes and read above them.
    metadata = torch.utils.checkpoint
    metadata._default_meta_extractor = shape_and_dtype
    metadata._allowed_determinism_checks_to_fns["default"] = shape_and_dtype
    # autograd.grad runs Python: the modes must stay within it.
    torch.autograd.has_torch_function = lambda args: False
    install_compiler()
    Functions().__enter__()
    Operations().__enter__()
    return device


def shape_and_dtype(tensor):
    return {"shape": tensor.shape, "dtype": tensor.dtype}


def install_compiler():
    """Triton is there, as with every torch for GPUs. A compiled function counts as one kernel."""
    find = importlib.util.find_spec

    def find_spec(name, package=None):
        return find("math" if name == "triton" else name, package)

    def compiled(function=None, **options):
        if function is None:
            return functools.partial(compiled, **options)

        @functools.wraps(function)
        def run(*args, **kwargs):
            with device.uncounted():
                out = function(*args, **kwargs)
            if device.counting and any(map(on_gpu, tensors_in(args, kwargs))):
                device.kernels[f"compiled {function.__name__}"] += 1
            return out
        return run
    importlib.util.find_spec = find_spec
    torch.compile = compiled


def install_cuda(cuda):
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 8
    cuda.set_device = lambda d: None
    cuda.current_device = lambda: 0
    cuda.synchronize = lambda d=None: device.wait("synchronize")
    cuda.empty_cache = lambda: None
    cuda.memory_allocated = cuda.memory_reserved = lambda d=None: device.live_bytes
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda d=None: device.peak_bytes
    cuda.mem_get_info = lambda d=None: (MEMORY - device.live_bytes, MEMORY)
    cuda.memory_stats = lambda d=None: {}
    cuda.reset_peak_memory_stats = lambda d=None: setattr(device, "peak_bytes", device.live_bytes)
    cuda.get_device_name = lambda d=None: "pretended GPU"
    cuda.get_device_capability = lambda d=None: (9, 0)
    cuda.get_device_properties = lambda d=None: SimpleNamespace(
        name="pretended GPU", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132)
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    cuda.is_current_stream_capturing = lambda: device.capturing
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    cuda.get_rng_state = lambda d=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, d=None: torch.set_rng_state(state)
    cuda.device = contextlib.nullcontext
    cuda.CUDAGraph = Graph
    cuda.graph = graph
    cuda._lazy_init = lambda: None


def install_safetensors():
    """safetensors.safe_open(.., device="cuda:0")."""
    opened = safetensors.safe_open

    class SafeOpen:
        def __init__(self, path, framework, device="cpu", **options):
            self.gpu = str(device).startswith("cuda")
            self.file = opened(path, framework, device="cpu", **options)

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            tensor = self.inner.get_tensor(name)
            return put(tensor.clone()) if self.gpu else tensor

        def get_tensors(self):
            return {name: self.get_tensor(name) for name in self.inner.keys()}

        def __getattr__(self, name):
            return getattr(self.inner, name)
    safetensors.safe_open = SafeOpen


def install_distributed():
    """nccl is gloo underneath, and refuses tensors of the host."""
    begin = dist.init_process_group
    reduce = dist.all_reduce

    def init_process_group(backend=None, **settings):
        device.backend = backend
        settings.pop("device_id", None)
        return begin("gloo" if backend == "nccl" else backend, **settings)

    def all_reduce(tensor, *args, **kwargs):
        if device.backend == "nccl" and not on_gpu(tensor):
            raise RuntimeError(f"No backend type associated with device type cpu ({place()})")
        return reduce(tensor, *args, **kwargs)
    dist.init_process_group = init_process_group
    dist.all_reduce = all_reduce


# ---- The command ---------------------------------------------------------------------------------

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--json", type=Path, help="write the counters into this file")
    p.add_argument("program", help="polylora, grpo, evaluate or rewards")
    p.add_argument("arguments", nargs=argparse.REMAINDER)
    args = p.parse_args()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    install()
    program = __import__(args.program)
    try:
        code = program.main(args.arguments)
    except SystemExit as e:
        code = e.code
    if args.json:
        args.json.write_text(json.dumps(device.summary(), indent=2) + "\n")
    with without_functions():
        print(device.report(), file=sys.stderr)
    return code


if __name__ == "__main__":
    # The project imports nothing from here, but tests import this file by its name.
    import pretend_gpu
    sys.exit(pretend_gpu.main())
