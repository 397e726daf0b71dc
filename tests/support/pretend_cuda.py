"""A GPU that is not there: tensors that say `cuda:0`, hold CPU data and refuse what CUDA refuses.

    subprocess.run([sys.executable, "program.py"], env=pretend_cuda.environment(folder))

    pretend_cuda.install()  # in the program, once, before any tensor is on the GPU
    model.to("cuda")(torch.ones(2))  # RuntimeError: ... at least two devices, cuda:0 and cpu

Every operation computes on the CPU, so results are those of the CPU. What is refused: operations on
tensors of both devices, except for copies and what CUDA takes from the CPU (scalars, indices); a
generator of the other device; `numpy()`; a second GPU. Kernels, streams and the memory of a GPU are
not there. `torch.save` writes CPU tensors.

Needs a CUDA build of torch and a C compiler: torch's autograd engine asks the driver whether the
device has a context, so a library of two functions takes the driver's place. A program must not
fork after its first backward pass: the engine has threads for the device.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
MEMORY = 24 * 10**9  # bytes
DRIVER = """
signed char pretend_devices = 0;
signed char _ZN3c104cuda12device_countEv(void) { return pretend_devices; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    return *flags = *active = 0;
}
"""  # the first function is torch's c10::cuda::device_count()

_TorchGenerator = torch.Generator
_aten = torch.ops.aten
_COPYING = {_aten.copy_, _aten._copy_from}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index_put}
_TAKE_SCALARS = {  # of the CPU, though they are not tagged as pointwise
    *(_aten.index_put, _aten.index_put_, _aten._unsafe_index_put),
    *(_aten.fill, _aten.fill_, _aten.masked_fill, _aten.masked_fill_),
}


def is_possible() -> bool:
    """Whether this machine can pretend."""
    return torch.backends.cuda.is_built() and shutil.which("cc") is not None


def environment(folder: Path) -> dict[str, str]:
    """Build what takes the driver's place in a folder; return the environment of the program."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-xc", "-", "-o", library]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    paths = os.pathsep.join(path for path in sys.path if path)  # as pytest has set them
    return os.environ | {
        **{"LD_PRELOAD": str(library), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths},
        **{"OMP_NUM_THREADS": "1"},
    }


def install() -> None:
    """Put the GPU into this process, for good."""
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, as there is no device yet
    ctypes.c_byte.in_dll(ctypes.CDLL("libcuda.so.1"), "pretend_devices").value = 127
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` moves
    torch.autograd.set_multithreading_enabled(False)  # other threads have not got the mode
    torch.__future__.set_swap_module_params_on_conversion(True)  # `to` keeps the parameters
    use_plain_kernels()
    for name, value in _TORCH_CUDA.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    torch.Generator = Generator
    torch.nn.Parameter.data = CudaTensor.data
    _Mode().__enter__()


def use_plain_kernels() -> None:
    """Let torch choose the kernels that it has on every device, for equal results on both."""
    torch.backends.cudnn.enabled = False
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)


def _set_data(self: Tensor, other: Tensor) -> None:
    if isinstance(self, CudaTensor) == isinstance(other, CudaTensor):
        Tensor.data.__set__(self, other)
        if isinstance(self, CudaTensor):
            self.on_cpu = other.on_cpu
    else:  # moves to the other device
        is_parameter = isinstance(self, torch.nn.Parameter)
        new = torch.nn.Parameter(other, self.requires_grad) if is_parameter else other.detach()
        torch.utils.swap_tensors(self, new)


class CudaTensor(Tensor):
    """A tensor on the GPU; its values are in `on_cpu`."""

    on_cpu: Tensor
    data = property(Tensor.data.__get__, _set_data)

    @staticmethod
    def __new__(cls, values: Tensor) -> "CudaTensor":
        self = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=CUDA,
        )
        self.on_cpu = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # in threads without the mode
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"{self.cpu()!r}.cuda()"

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> "CudaTensor":
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy(force=True)
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.on_cpu.untyped_storage()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()


class Generator(torch.Generator):
    """`torch.Generator` that says its device; its numbers are the CPU's on both."""

    on_gpu: ClassVar[set[int]] = set()
    """Addresses, as operations are given other objects for the same generator."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        self = super().__new__(cls, "cpu")
        (cls.on_gpu.add if _is_cuda(device) else cls.on_gpu.discard)(self._cdata)
        return self

    @property
    def device(self) -> torch.device:
        return _device_of(self)


class _Mode(TorchDispatchMode):
    """Sees every operation, also those that make the first tensor on the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # saves half of the time


@dataclass(frozen=True)
class _Rules:
    """What an operation takes of the CPU together with tensors on the GPU."""

    copies: bool
    indexes: bool
    takes_scalars: bool

    @classmethod
    @cache
    def of(cls, func: Any) -> "_Rules":
        packet = func.overloadpacket
        takes_scalars = torch.Tag.pointwise in func.tags or packet in _TAKE_SCALARS
        return cls(packet in _COPYING, packet in _INDEXING, takes_scalars)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU, and say that the result is where CUDA would have it."""
    operands: list[Any] = []  # tensors and generators
    plain_args, plain_kwargs = _plain(args, operands), _plain(kwargs, operands)
    device = _result_device(_Rules.of(func), operands, kwargs.get("device"), func)
    if "pin_memory" in kwargs:
        plain_kwargs["pin_memory"] = False
    if device == CUDA and "device" in kwargs:
        plain_kwargs["device"] = CPU
    on_gpu = {id(x.on_cpu): x for x in operands if isinstance(x, CudaTensor)}

    def wrap(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(map(wrap, x))
        if not isinstance(x, Tensor):
            return x
        if id(x) not in on_gpu:
            # a lazy conjugate would not be seen by operations on its wrapper
            return CudaTensor(x.resolve_conj().resolve_neg()) if device == CUDA else x
        same = on_gpu[id(x)]  # written to in place
        if (same.shape, same.stride()) != (x.shape, x.stride()):
            Tensor.data.__set__(same, CudaTensor(x))
        return same

    return wrap(func(*plain_args, **plain_kwargs))


def _plain(x: Any, operands: list[Any]) -> Any:
    """Replace tensors on the GPU by their values, in containers too; collect the operands."""
    if isinstance(x, Tensor):
        operands.append(x)
        return x.on_cpu if isinstance(x, CudaTensor) else x
    if isinstance(x, tuple | list):
        return [_plain(y, operands) for y in x]
    if isinstance(x, dict):
        return {key: _plain(y, operands) for key, y in x.items()}
    if isinstance(x, _TorchGenerator):
        operands.append(x)
    return x


def _result_device(
    rules: _Rules, operands: list[Any], requested: torch.device | None, func: Any
) -> torch.device:
    """Return the device of an operation's result.

    Raises:
        RuntimeError: CUDA refuses the operation.
    """
    tensors = [x for x in operands if isinstance(x, Tensor)]
    _check_tensors(rules, tensors, func)
    if requested is not None:
        device = CUDA if _is_cuda(requested) else requested
    elif rules.copies or rules.indexes:
        device = tensors[0].device
    else:
        device = CUDA if any(isinstance(x, CudaTensor) for x in tensors) else CPU
    for x in operands:
        if isinstance(x, _TorchGenerator) and _device_of(x).type != device.type:
            raise RuntimeError(
                f"Expected a '{device.type}' device type for generator but found "
                f"'{_device_of(x).type}' ({func})"
            )
    return device


def _check_tensors(rules: _Rules, tensors: list[Tensor], func: Any) -> None:
    """Refuse tensors of both devices where CUDA does."""
    is_on_gpu = [isinstance(x, CudaTensor) for x in tensors]
    if rules.copies or all(is_on_gpu) or not any(is_on_gpu):
        return
    if rules.indexes:
        if not is_on_gpu[0]:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
                f" ({func})"
            )
        tensors = [] if func.overloadpacket is _aten.index else tensors[-1:]  # the written values
    for x in tensors:
        if not isinstance(x, CudaTensor) and not (rules.takes_scalars and x.ndim == 0):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func})"
            )


def _device_of(generator: torch.Generator) -> torch.device:
    return CUDA if generator._cdata in Generator.on_gpu else CPU


def _is_cuda(device: Any) -> bool:
    if torch.device(device).type != "cuda":
        return False
    if torch.device(device).index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal: {device}")
    return True


_STATISTICS = (
    *("memory_allocated", "max_memory_allocated"),
    *("memory_reserved", "max_memory_reserved"),
)
_TORCH_CUDA: dict[str, Any] = {  # functions of torch.cuda that ask the driver
    "_lazy_init": lambda: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "ipc_collect": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "get_device_name": lambda device=None: "Pretend",
    "get_device_capability": lambda device=None: (8, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(
        name="Pretend", total_memory=MEMORY, major=8, minor=0, multi_processor_count=1
    ),
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    **dict.fromkeys(_STATISTICS, lambda device=None: 0),
}
