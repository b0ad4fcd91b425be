"""The same values in other memory layouts."""

from torch import Tensor

LAYOUTS = ("transposed", "strided", "offset", "expanded")


def relayout(x: Tensor, layout: str) -> Tensor:
    """`x`'s values (for "expanded": of its first slice, repeated) in a layout that is not dense.

    Args:
        x: any tensor.
        layout: "transposed" stores the last two dimensions swapped; "strided" leaves a gap after
            each element; "offset" starts one element into its storage, so that rows lose the
            alignment of the allocation; "expanded" repeats the first slice with stride 0.

    Raises:
        ValueError: for an unknown layout.
    """
    x = x.detach()
    if layout == "transposed":
        if x.dim() < 2:
            return x.clone()
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        if x.dim() == 0:
            return x.clone()
        wide = x.new_zeros(*x.shape, 2)
        wide[..., 0] = x
        return wide[..., 0]
    if layout == "offset":
        flat = x.new_zeros(x.numel() + 1)
        view = flat[1:].view(x.shape)
        view.copy_(x)
        return view
    if layout == "expanded":
        if x.dim() < 2 or x.size(0) == 0:
            return x.clone()
        return x[:1].clone().expand(x.shape)
    raise ValueError(f"layout: got {layout!r}; expected one of {', '.join(LAYOUTS)}; fix the name")
