"""Parts of many tensors at once."""

import torch


def _idx(t, r, c):
    r = torch.arange(t.shape[0]) if r is None else r
    c = None if t.dim() < 2 else (torch.arange(t.shape[1]) if c is None else c)
    return r, c


@torch.no_grad()
def gather_parts(parts, wholes, rows, columns):
    for p, w, r, c in zip(parts, wholes, rows, columns, strict=True):
        r, c = _idx(w, r, c)
        v = w.index_select(0, r.clamp_min(0))
        v[r < 0] = 0
        if c is not None:
            v = v.index_select(1, c.clamp_min(0))
            v[:, c < 0] = 0
        p.copy_(v)


@torch.no_grad()
def scatter_parts(wholes, parts, rows, columns):
    for p, w, r, c in zip(parts, wholes, rows, columns, strict=True):
        r, c = _idx(w, r, c)
        if c is None:
            w[r[r >= 0]] = p[r >= 0]
        else:
            w[r[r >= 0][:, None], c[c >= 0][None]] = p[r >= 0][:, c >= 0]
