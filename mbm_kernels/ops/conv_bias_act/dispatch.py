"""The work of a convolution: which kernel runs, by each backend, and how much of what it does."""

from mbm_kernels._core.cost import Sizes, Work, family, padded, share
from mbm_kernels.ops.conv_bias_act import geometry

TRANSCENDENTAL = 4  # the activations of geometry.ACTIVATIONS from here on take exp or erf
FEW_CHANNELS = 4  # of an image or its gray version
IN_TILE = 36  # products of a tile, of a channel in and one out
MOST_TAPS = 25  # beyond 5 x 5 a convolution is called long
MOST_ACROSS = 7  # columns of a long kernel beyond which oneDNN takes more for each product
MOST_GATHERED = 8  # pixels of a row of NCHW whose taps are copied rather than transposed
# csrc's name of a forward kernel where it is not the first word of the model's.
FORWARD = dict.fromkeys(("few direct", "grouped", "grouped planes", "grouped rows"), "direct")
MOST_GROUP = 64  # channels of a group that strips and rows take
STRIP_TAPS = (3, 5, 7)  # rows of a depthwise kernel
STREAMED = 3 << 20  # bytes of an image's x and y from which few taps read channels_last in order
OTHER_POOL = 2  # of geometry.POOLS: every pool past 2x2


def cpu(p: Sizes) -> Work:
    """Kernels as csrc/conv_bias_act chooses them (README, "The cpu backend")."""
    threads, lanes = p["threads"], p["lanes"]
    kernel = _forward(p)
    amounts = _moved(p)
    group_in, group_out = p["C"] // p["groups"], p["K"] // p["groups"]
    if kernel == "winograd":
        tiles = geometry.winograd_tiles(p["B"], (p["conv_y"], p["conv_x"]))
        amounts["products"] = share(tiles, threads) * IN_TILE * group_in * padded(p["K"], lanes)
        amounts["tiles_in"] = share(tiles, threads) * group_in
        amounts["tiles_out"] = share(tiles, threads) * p["K"]
    else:
        width, across = p["conv_x"], p["groups"] * padded(group_out, lanes)
        if kernel.endswith("planes") and kernel != "planes":
            width, across = padded(width, lanes), p["K"]  # lanes are pixels
            amounts["rows"] = share(p["B"] * p["C"] * p["Y"], threads)
        elif kernel.startswith("depthwise"):
            across = p["C"]
        pixels = p["B"] * p["conv_y"] * width
        per = p["R"] * p["S"] * (1 if kernel.startswith("depthwise") else group_in)
        amounts["products"] = share(pixels, threads) * per * across
        amounts["taps"] = share(pixels, threads) * per * p["groups"]
        amounts["inside"] = amounts["products"] * _inside(p, "Y") * _inside(p, "X")
    return Work(kernel + _long(p), amounts)


def forward_kernel(p: Sizes) -> str:
    """csrc's name of the kernel that a forward runs."""
    kernel = _forward(p)
    return family(FORWARD.get(kernel, kernel))


def torch(p: Sizes) -> Work:
    """oneDNN's kernels, by what makes their rates differ."""
    group_in, group_out = p["C"] // p["groups"], p["K"] // p["groups"]
    lanes = p["lanes"]
    if p["depthwise"]:
        kernel, per, across = "depthwise", 1, padded(p["C"], lanes)
    elif p["groups"] > 1:
        kernel, per, across = "grouped", group_in, p["groups"] * padded(group_out, lanes)
    elif p["R"] == p["S"] == 1:
        kernel, per, across = "pointwise", padded(group_in, lanes), padded(group_out, lanes)
    elif p["C"] <= FEW_CHANNELS:
        kernel, per, across = "few", group_in, padded(group_out, lanes)
    else:
        kernel, per, across = "spatial", padded(group_in, lanes), padded(group_out, lanes)
    pixels = share(p["B"] * p["conv_y"] * p["conv_x"], p["threads"])
    amounts = _moved(p)
    amounts["products"] = pixels * per * across * p["R"] * p["S"]
    amounts["taps"] = pixels * per * p["R"] * p["S"]
    rows = amounts["products"] * _inside(p, "Y")
    amounts["inside"] = rows * _inside(p, "X")
    amounts["across_edges"] = rows - amounts["inside"]
    if p["R"] * p["S"] > MOST_TAPS:
        amounts["wide"] = rows if p["S"] > MOST_ACROSS else 0
    if p["stride"] != 1 and kernel != "few":
        kernel += " strided"
    kernel += _long(p)
    return Work(kernel if p["layout"] else f"{kernel} nchw", amounts)


def _inside(p: Sizes, axis: str) -> float:
    """The share of an axis's products whose tap is of the image, not of its padding."""
    size, last = p[axis], p[f"conv_{axis.lower()}"] - 1
    taps, start = ("R", "top") if axis == "Y" else ("S", "left")
    step, spread = p[f"stride_{axis.lower()}"], p["dilation"] or 1
    read = 0
    for tap in range(-p[start], p[taps] * spread - p[start], spread):
        first = max(0, -(tap // step))
        read += max(0, min(last, (size - 1 - tap) // step) - first + 1)
    return read / ((last + 1) * p[taps])


def _long(p: Sizes) -> str:
    """What a kernel's name ends with where its taps are many: a product then costs another time."""
    return " long" if p["R"] * p["S"] > MOST_TAPS else ""


def _forward(p: Sizes) -> str:
    sizes = (p["R"], p["S"], *[p["stride"]] * 2, *[p["dilation"]] * 2, p["groups"])
    takes = p["pool"] < OTHER_POOL and geometry.takes_winograd(sizes, p["C"], p["K"])
    if takes and geometry.repays_winograd(p["B"], (p["conv_y"], p["conv_x"]), p["C"], p["K"]):
        return "winograd"
    few = p["C"] <= FEW_CHANNELS and p["groups"] == 1
    plain = p["activation"] < 2 or not p["pool"]
    if few and not p["residual"] and plain and p["pool"] < OTHER_POOL:
        return "few"
    if p["depthwise"]:
        return _depthwise_kernel(p)
    one_by_one = p["R"] == p["S"] == 1
    if not p["pool"] and (one_by_one or p["groups"] == 1):
        if p["layout"]:
            in_place = one_by_one and p["stride"] == 1 and p["unpadded"]
            return "pixels in place" if in_place else "pixels"
        if p["C"] > 1 and (one_by_one or p["conv_x"] <= MOST_GATHERED):
            return "planes"
    if few:
        return "few direct"
    if p["groups"] > 1:
        if p["pool"] or p["C"] // p["groups"] > MOST_GROUP:
            return "grouped"
        if p["layout"]:
            return "grouped rows"
        return "grouped planes" if _plain_steps(p) else "grouped"
    return "direct" if p["stride"] == 1 else "direct strided"


def _plain_steps(p: Sizes) -> bool:
    return p["stride"] in (1, 2) and p["dilation"] == 1


def _depthwise_kernel(p: Sizes) -> str:
    rows = p["layout"] and p["S"] in STRIP_TAPS and _plain_steps(p) and p["pool"] < OTHER_POOL
    moved = 4 * p["C"] * (p["Y"] * p["X"] + p["conv_y"] * p["conv_x"])
    streams = rows and p["R"] * p["S"] <= 9 and moved >= STREAMED
    if not p["pool"] and p["R"] in STRIP_TAPS and _plain_steps(p) and not streams:
        return "depthwise strips" if p["layout"] else "depthwise planes"
    return "depthwise rows" if rows else "depthwise"


def _moved(p: Sizes) -> dict[str, float]:
    """Calls and elements moved, which every kernel has."""
    threads = p["threads"]
    x = p["B"] * p["C"] * p["Y"] * p["X"]
    y = p["B"] * p["K"] * p["conv_y"] * p["conv_x"]
    weights = p["K"] * (p["C"] // p["groups"]) * p["R"] * p["S"]
    moved = x + y + weights
    return {
        "calls": 1,
        "forks": int(threads > 1),
        "x": share(x, threads),
        "y": share(y, threads),
        "weights": weights,
        "rows": share(p["B"] * p["conv_y"], threads),
        "streamed": share(p["B"] * p["conv_y"], threads) * weights,
        "transcendental": share(y, threads) if p["activation"] >= TRANSCENDENTAL else 0,
        "activated": share(y, threads) if p["activation"] else 0,
        "pooled": share(y, threads) if p["pool"] else 0,
        "stored": share(y, threads) // (4 if p["pool"] else 1),
        "residual": share(y, threads) if p["residual"] else 0,
        "transposed": share(x + y, threads) if not p["layout"] else 0,
        "moved_beyond_cache": moved if 4 * moved > p["cache"] else 0,
    }
