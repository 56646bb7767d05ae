"""The equations of vqtorch's layers, written out in float64."""

import torch
from torch import nn

from vqkernels.compat.vqtorch.nn import GroupVectorQuant, ResidualVectorQuant, VectorQuant
from vqkernels.testing import DEVICE

D, K = 8, 24
EPS = torch.finfo(torch.float64).eps
KINDS = [
    (VectorQuant, {}),
    (GroupVectorQuant, {"groups": 2}),
    (GroupVectorQuant, {"groups": 4, "share": False}),
    (ResidualVectorQuant, {"groups": 2}),
    (ResidualVectorQuant, {"groups": 3, "share": False}),
]


def made(kind, **options):
    """A face in float64 whose affine map is not the identity."""
    face = kind[0](D, K, **kind[1], **options).to(DEVICE).double()
    if face.affine_lr:
        for parameter in face.affine_transform.parameters():
            nn.init.normal_(parameter, std=0.05)
    return face


def latents(*shape, dtype=torch.float64):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def shown(face):
    """The codebook of each group, as eq. 15 has it: a list of (k, width)."""
    books = []
    for group in range(face.groups):
        size = K if face.share else K // face.groups
        first = 0 if face.share else group * size
        book = face.codebook.weight[first : first + size]
        if face.affine_lr:
            s, b = face.affine_transform.scale, face.affine_transform.bias
            parts = book.chunk(len(s))
            book = torch.cat(
                [(1 + face.affine_lr * s[i]) * p + face.affine_lr * b[i] for i, p in enumerate(parts)]
            )
        books.append((book, first))
    return books


def equations(face, z):
    """What the layer shall return, by eq. 21 and the sum of the two squared errors, with torch's own gradient."""
    rows = z.movedim(face.dim, -1)
    books = shown(face)
    residual = isinstance(face, ResidualVectorQuant)
    chosen, distances, values = [], [], []
    total = torch.zeros_like(rows)
    for group, (book, first) in enumerate(books):
        part = rows - total.detach() if residual else rows.chunk(len(books), -1)[group]
        distance = (part.detach()[..., None, :] - book.detach()).square().sum(-1).sqrt()
        least = distance.min(-1)
        distances.append(least.values)
        chosen.append(least.indices + first)
        values.append(book[least.indices])
        if residual:
            total = total + values[-1]
    z_q = total if residual else torch.cat(values, -1)
    error = (1 - face.beta) * (rows - z_q.detach()).square() + face.beta * (rows.detach() - z_q).square()
    loss = error.flatten(1).mean(1)
    out = rows + (z_q - rows).detach() + face.nu * (z_q - z_q.detach())
    loss = loss.mean() if type(face) is VectorQuant else loss
    return out.movedim(-1, face.dim), torch.stack(chosen, -1), torch.stack(distances, -1), loss, z_q
