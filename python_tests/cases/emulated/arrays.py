"""Arrays for kernels: in guarded memory, in bf16 and f16; and convolutions in double to compare with."""

import ctypes
import mmap
import weakref

import numpy as np

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_poison, _unpoison = (getattr(_libc, f"__asan_{name}_memory_region", None) for name in ("poison", "unpoison"))


class _Region(mmap.mmap):
    """Pages that hold one array, between two protected pages; the array ends where the second begins. The slack around
    it is poisoned under AddressSanitizer; without, check_surroundings() looks whether it has changed."""

    def __new__(cls, nbytes: int):
        room = -(-nbytes // 16) * 16
        pages = max(-(-room // PAGE), 1)
        self = super().__new__(cls, -1, (pages + 2) * PAGE)
        memory = np.frombuffer(self, np.uint8)
        self.start, self.first = memory.ctypes.data, (pages + 1) * PAGE - room
        self.slack = (PAGE, self.first), (self.first + nbytes, (pages + 1) * PAGE)
        self.mark = (
            self.start // PAGE * 29 + 0xA5
        ) & 0xFF  # another one for each region, since a kernel may copy slack
        for page in (0, pages + 1):
            at = ctypes.c_void_p(self.start + page * PAGE)
            assert _libc.mprotect(at, ctypes.c_size_t(PAGE), 0) == 0
        for a, b in self.slack:
            memory[a:b] = self.mark
            if _poison:
                _poison(ctypes.c_void_p(self.start + a), ctypes.c_size_t(b - a))
        if _unpoison:
            weakref.finalize(self, _unpoison, ctypes.c_void_p(self.start), ctypes.c_size_t(len(self)))
        return self


_regions: "weakref.WeakValueDictionary[int, _Region]" = weakref.WeakValueDictionary()


def guarded(values, dtype=None) -> np.ndarray:
    """A copy in memory of its own. It starts at a multiple of 16 and ends at most 15 bytes before a protected page."""
    values = np.asarray(values, dtype)
    region = _Region(values.nbytes)
    array = np.frombuffer(region, values.dtype, values.size, region.first).reshape(values.shape)
    array[...] = values
    _regions[region.start + region.first] = region
    return array


def check_surroundings(name: str, array: np.ndarray) -> None:
    """Asserts that the slack around a guarded array has not changed."""
    region = _regions.get(array.ctypes.data)
    if region is None or _poison:
        return
    memory = np.frombuffer(region, np.uint8)
    for (a, b), side in zip(region.slack, ("before the first", "behind the last"), strict=True):
        assert (memory[a:b] == region.mark).all(), f"{name}: writes {side} element of an array {array.shape}"


# ---- elements: f32 is float32; bf16 and f16 are held as their bits ----

STORAGE = {"f32": np.float32, "tf32": np.float32, "bf16": np.uint16, "f16": np.uint16}


def narrow(values, element: str) -> np.ndarray:
    """Rounded to the nearest (ties to even), guarded."""
    values = np.asarray(values, np.float32)
    if element == "bf16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return guarded(np.where(np.isnan(values), 0x7FFF, rounded), np.uint16)
    if element == "f16":
        with np.errstate(over="ignore"):
            return guarded(np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16)))
    return guarded(values)


def widen(stored: np.ndarray, element: str) -> np.ndarray:
    if element == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if element == "f16":
        return stored.view(np.float16).astype(np.float32)
    return np.array(stored, np.float32)


def round_to_tf32(values) -> np.ndarray:
    """To 10 bits of mantissa, ties away from zero. NaNs stay."""
    values = np.asarray(values, np.float32)
    rounded = ((values.view(np.uint32) + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), values, rounded)


def poison(shape, element="f32") -> np.ndarray:
    """An array to write results into: full of NaN; of bytes 0x7f if `element` is an integer dtype."""
    if element in STORAGE:
        return narrow(np.full(shape, np.nan, np.float32), element)
    return guarded(
        np.full(np.prod(shape, dtype=int) * np.dtype(element).itemsize, 0x7F, np.uint8).view(element)
    ).reshape(shape)


def integers(rng: np.random.Generator, shape, most: int = 4) -> np.ndarray:
    """float32 integers in [-most, most]: sums of their products are exact."""
    return rng.integers(-most, most + 1, shape).astype(np.float32)


# ---- convolutions, in double ----


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def out_size(x_shape, w_shape, stride=1, padding=0, dilation=1) -> tuple[int, int]:
    """(P, Q)"""
    axes = zip(x_shape[2:], w_shape[2:], _pair(stride), _pair(padding), _pair(dilation), strict=True)
    return tuple(max(0, (size + 2 * p - d * (k - 1) - 1) // s + 1) for size, k, s, p, d in axes)


def _taps(x, w_shape, stride, padding, dilation):
    """For each tap (r, s): the view [N, G, C / G, P, Q] of padded x that it is multiplied with."""
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    P, Q = out_size((*x.shape[:2], x.shape[2] - 2 * ph, x.shape[3] - 2 * pw), w_shape, stride, padding, dilation)
    N, C = x.shape[:2]
    groups = C // w_shape[1]
    for r in range(w_shape[2]):
        for s in range(w_shape[3]):
            view = x[:, :, r * dh : r * dh + (P - 1) * sh + 1 : sh, s * dw : s * dw + (Q - 1) * sw + 1 : sw]
            yield r, s, view[:, :, :P, :Q].reshape(N, groups, C // groups, P, Q) if P and Q else None


def _padded(x, padding):
    (ph, pw) = _pair(padding)
    return np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (ph, ph), (pw, pw)))


def conv2d(x, w, stride=1, padding=0, dilation=1) -> np.ndarray:
    """x [N, C, H, W], w [K, C / G, R, S] -> [N, K, P, Q]; G by the shapes"""
    N, C, K = x.shape[0], x.shape[1], w.shape[0]
    P, Q = out_size(x.shape, w.shape, stride, padding, dilation)
    groups = C // w.shape[1]
    y = np.zeros((N, groups, K // groups, P, Q))
    split = np.asarray(w, np.float64).reshape(groups, K // groups, *w.shape[1:])
    for r, s, view in _taps(_padded(x, padding), w.shape, stride, padding, dilation):
        if view is not None:
            y += np.einsum("ngcpq,gkc->ngkpq", view, split[..., r, s], optimize=True)
    return y.reshape(N, K, P, Q)


def conv2d_grad_weight(grad, x, w_shape, stride=1, padding=0, dilation=1) -> np.ndarray:
    """grad [N, K, P, Q], x [N, C, H, W] -> [K, C / G, R, S]"""
    K = w_shape[0]
    groups = x.shape[1] // w_shape[1]
    split = np.asarray(grad, np.float64).reshape(grad.shape[0], groups, K // groups, *grad.shape[2:])
    grad_w = np.zeros((groups, K // groups, *w_shape[1:]))
    for r, s, view in _taps(_padded(x, padding), w_shape, stride, padding, dilation):
        if view is not None:
            grad_w[..., r, s] = np.einsum("ngcpq,ngkpq->gkc", view, split, optimize=True)
    return grad_w.reshape(w_shape)


def conv2d_grad_input(grad, w, x_shape, stride=1, padding=0, dilation=1) -> np.ndarray:
    """grad [N, K, P, Q], w [K, C / G, R, S] -> [N, C, H, W]"""
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    N, C, H, W = x_shape
    K, (P, Q) = w.shape[0], grad.shape[2:]
    groups = C // w.shape[1]
    split = np.asarray(grad, np.float64).reshape(N, groups, K // groups, P, Q)
    taps = np.asarray(w, np.float64).reshape(groups, K // groups, *w.shape[1:])
    padded = np.zeros((N, C, H + 2 * ph, W + 2 * pw))
    for r in range(w.shape[2]) if P and Q else ():
        for s in range(w.shape[3]):
            part = np.einsum("ngkpq,gkc->ngcpq", split, taps[..., r, s], optimize=True).reshape(N, C, P, Q)
            padded[:, :, r * dh : r * dh + P * sh : sh, s * dw : s * dw + Q * sw : sw][:, :, :P, :Q] += part
    return padded[:, :, ph : ph + H, pw : pw + W]
