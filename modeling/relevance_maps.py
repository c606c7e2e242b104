"""Maps of where a QueryConditionedVQA looked, from its relevance: all layers in one, and what spoke for the answer."""

import torch

from regard.modeling.modeling_query_conditioned_vqa import QueryConditionedVQAModel


def roll_up(relevance: torch.Tensor) -> torch.Tensor:
    """The relevance of all layers in one map: each layer's is averaged with the map of those before it, as attention
    rollout does with residual connections (Abnar and Zuidema, 2020), so that later layers weigh more.

    Args:
        relevance: `(questions, layers, patches)`, not negative.

    Returns:
        `(questions, patches)`, each sums to 1.

    Raises:
        ValueError: the shape is another, or there are no layers.
    """
    if relevance.ndim != 3 or not relevance.shape[1]:
        raise ValueError(f"give relevance (questions, layers, patches), not {tuple(relevance.shape)}")
    first, *later = relevance.float().unbind(1)
    rolled = _normalise(first)
    for layer in later:
        rolled = _normalise(0.5 * rolled + 0.5 * layer)
    return rolled


def gradient_relevance(model: QueryConditionedVQAModel, **inputs) -> torch.Tensor:
    """The relevance of each layer, weighed by how much more of it would raise the best answer's logit: patches that
    spoke for the answer, without those that spoke against it or for nothing.

    Leaves the model and its parameters' gradients as they are; call it outside `torch.inference_mode`.

    Args:
        model: in evaluation mode.
        inputs: of the model's forward, without labels.

    Returns:
        `(questions, layers, patches)`, each sums to 1; where nothing spoke for the answer, the relevance itself.

    Raises:
        ValueError: the model is in training mode, or its inputs are wrong.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which its relevance is noisy: call model.eval() first")
    relevances: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: relevances.append(output[2]))
        for layer in model.encoder.layers
    ]
    # Also frozen models must give gradients, and none need reach the image encoder.
    hooks.append(
        model.encoder.layers[0].register_forward_pre_hook(
            lambda _, args: (args[0].detach().requires_grad_(), *args[1:])
        )
    )
    try:
        with torch.enable_grad():
            best = model(**inputs).logits.max(-1).values.sum()
    finally:
        for hook in hooks:
            hook.remove()
    maps, kept = [], None
    for relevance, gradient in zip(relevances, torch.autograd.grad(best, relevances), strict=True):
        relevance = relevance.detach().float()
        weighed = relevance * gradient.float().clamp(min=0)
        weighed = torch.where(weighed.sum(-1, keepdim=True) > 0, weighed, relevance)
        if kept is not None:
            weighed = torch.zeros_like(maps[0]).scatter(1, kept, weighed)
        elif model.config.keep_patches is not None:  # later layers see these patches of the first, in this order
            kept = relevances[0].topk(min(model.config.keep_patches, relevance.shape[1]), sorted=False).indices
        maps.append(_normalise(weighed))
    return torch.stack(maps, dim=1)


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of an image's patches: square patches that fill it, but for a part of one at its edges.

    Args:
        patches: their number.
        height, width: of the image that the model sees, in any unit.

    Raises:
        ValueError: no grid of so many square patches fits the image.
    """
    fitting = []
    for rows in range(1, patches + 1):
        columns, rest = divmod(patches, rows)
        # Whether the same side of a patch gives both numbers, rounded down or up.
        down = height * columns < width * (rows + 1) and width * rows < height * (columns + 1)
        up = height * (columns - 1) < width * rows and width * (rows - 1) < height * columns
        if not rest and (down or up):
            elongation = (height * columns) / (width * rows)
            fitting.append((max(elongation, 1 / elongation), rows, columns))
    if not fitting:
        raise ValueError(f"{patches} patches make no grid of squares on an image of {width}x{height}")
    return min(fitting)[1:]


def _normalise(maps: torch.Tensor) -> torch.Tensor:
    return maps / maps.sum(-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


__all__ = ["gradient_relevance", "patch_grid", "roll_up"]
