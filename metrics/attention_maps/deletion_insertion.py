"""What a model's answers depend on: they should fall as the cells that a map marks are deleted from the image, and rise
as they are inserted."""

from collections.abc import Callable

import torch


@torch.no_grad()
def deletion_insertion(
    score: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    maps: torch.Tensor,
    steps: int = 16,
    baseline: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Deletion and insertion (Petsiuk et al., 2018, RISE, https://arxiv.org/abs/1806.07421): `score` as the cells of
    each image give way to the baseline, or take its place, from the most relevant to the least.

    A good map has a low area under the deletion curve, and a high one under the insertion curve; compare both with
    those of random maps. Each pixel belongs to the cell that its centre lies in. Of equal cells the first goes first.

    Args:
        score: the probability `(samples,)` of each sample's chosen answer, for images `(samples, channels, height,
            width)`: it is called with all samples, in their order, 2 * (`steps` + 1) times, without gradients.
        images: `(samples, channels, height, width)`.
        maps: relevance `(samples, rows, columns)`. Rows and columns need not divide height and width.
        steps: number of steps from none to all cells, at most one a cell.
        baseline: what takes the place of deleted pixels, of a shape that expands to that of `images`. Default: each
            image's mean colour. RISE deletes to grey, and inserts into the blurred image: two calls, one with each.

    Returns:
        shares: `(steps + 1,)`, the share of cells deleted or inserted at each step, from 0 to 1.
        deletion, insertion: the curves, `(samples, steps + 1)`.
        deletion_auc, insertion_auc: `(samples,)`, the areas under them by the trapezoidal rule.

    Raises:
        ValueError: shapes do not fit, `steps` is not 1 to the number of cells, or maps are not finite.
    """
    maps = torch.as_tensor(maps, device=images.device)
    if images.ndim != 4 or maps.ndim != 3 or len(images) != len(maps) or not images.numel() or not maps.numel():
        raise ValueError(
            "give images (samples, channels, height, width) and maps (samples, rows, columns), none of them empty, not "
            f"{tuple(images.shape)} and {tuple(maps.shape)}"
        )
    samples, rows, columns = maps.shape
    height, width = images.shape[2:]
    if rows > height or columns > width:
        raise ValueError(f"maps of {rows} x {columns} cells are finer than images of {height} x {width} pixels")
    if not torch.isfinite(maps).all():
        raise ValueError("maps must be finite")
    cells = rows * columns
    if not 1 <= steps <= cells:
        raise ValueError(f"steps must be 1 to {cells}, the number of cells, not {steps}")
    if baseline is None:
        baseline = images.mean(dim=(2, 3), keepdim=True)
    elif baseline.ndim > 4 or any(
        size not in (1, full) for size, full in zip(baseline.shape[::-1], images.shape[::-1], strict=False)
    ):
        raise ValueError(f"baseline {tuple(baseline.shape)} must expand to the images' {tuple(images.shape)}")
    baseline = baseline.to(images)

    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = order.argsort(dim=1).view(samples, 1, rows, columns)
    y, x = (
        (2 * torch.arange(pixels, device=images.device) + 1) * patches // (2 * pixels)
        for pixels, patches in ((height, rows), (width, columns))
    )
    places = places[:, :, y[:, None], x]
    counts = [round(step * cells / steps) for step in range(steps + 1)]
    deletion, insertion = [], []
    for count in counts:
        first = places < count
        for curve, kept in ((deletion, ~first), (insertion, first)):
            scores = score(torch.where(kept, images, baseline))
            if scores.shape != (samples,):
                raise ValueError(
                    f"score must return shape ({samples},), one number an image, not {tuple(scores.shape)}"
                )
            curve.append(scores.float())
    shares = torch.tensor(counts, device=deletion[0].device) / cells
    curves = {"deletion": torch.stack(deletion, dim=1), "insertion": torch.stack(insertion, dim=1)}
    areas = {f"{name}_auc": torch.trapezoid(curve, shares, dim=1) for name, curve in curves.items()}
    return {"shares": shares, **curves, **areas}


__all__ = ["deletion_insertion"]
