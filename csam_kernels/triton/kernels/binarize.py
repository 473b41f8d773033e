"""Exact selection of the largest scores by radix select on ordered 32-bit keys; almost every score is read once.

A sample brackets the threshold. One scan marks what lies above the bracket and lists the few per cent within it, chunk
by chunk; three counts of the lists, by 11 bits of the distance from the range's low end, narrow the range to one key.
Ties are ranked by their numbers in the chunks before. A chunk whose list overflows is read again instead, and so are
all chunks when the bracket missed the threshold; nothing is decided on the host.
"""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.masks_common import address, inside, my_chunk

# A layer's row: scores, mask, size. A selection's row: first chunk, chunks, scores to keep, scores in all.
SCORES, MASK, SIZE, LAYER_FIELDS = (tl.constexpr(i) for i in range(4))
FIRST, CHUNKS, KEEP, VALUES, SELECTION_FIELDS = (tl.constexpr(i) for i in range(5))
# A selection's state: the bracket, scores above and within it, the range that the threshold lies in, how many scores of
# the range are kept, whether the bracket missed; then one histogram a count.
LOW, HIGH, ABOVE, FOUND, RANGE_LOW, RANGE_HIGH, NEED, MISSED = (tl.constexpr(i) for i in range(8))
HISTOGRAMS, COUNTS, BITS, BINS = tl.constexpr(8), tl.constexpr(3), tl.constexpr(11), tl.constexpr(2048)
STATE = tl.constexpr(8 + 3 * 2048)
LARGEST = tl.constexpr(2**32 - 1)  # no number has this key


@triton.jit
def keys_of(x, MAGNITUDE: tl.constexpr):
    """uint32 keys in the order of x, or of |x| where MAGNITUDE; -0 and +0 share one, NaN is below all numbers."""
    x = x.to(tl.float32)
    if MAGNITUDE:
        x = tl.abs(x)
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    keys = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, keys, 0)


@triton.jit
def magnitude_of(key):
    return (key.to(tl.uint32) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(
    row_ptr, chunk, lane, BLOCK: tl.constexpr, TYPE: tl.constexpr, MAGNITUDE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Keys of a chunk, and which lanes have one."""
    known = inside(row_ptr, SIZE, chunk * BLOCK, lane, ALIGNED)
    scores_ptr = address(row_ptr, SCORES, chunk * BLOCK, TYPE, ALIGNED)
    return keys_of(tl.load(scores_ptr + lane, mask=known, other=0.0), MAGNITUDE), known


@triton.jit
def shift_to_bin(low, high):
    """How far a distance of at most high - low is shifted to leave BITS bits."""
    exponent = ((high - low).to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023
    return tl.maximum(exponent + 1 - BITS, 0)


@triton.jit
def count_bins(histogram_ptr, keys, chosen, low, high):
    """Add the chosen keys' bins of the range low .. high to a histogram.

    Ties crowd the ends of the range (masks are clipped to [0, 1]): the two end bins are counted before they are added.
    """
    bins = ((keys - low.to(tl.uint32)) >> shift_to_bin(low, high).to(tl.uint32)).to(tl.int32)
    first, last = tl.min(tl.where(chosen, bins, BINS - 1)), tl.max(tl.where(chosen, bins, 0))
    at_first, at_last = chosen & (bins == first), chosen & (bins == last) & (bins != first)
    tl.atomic_add(histogram_ptr + first, tl.sum(at_first.to(tl.int32)).to(tl.int64))
    tl.atomic_add(histogram_ptr + last, tl.sum(at_last.to(tl.int32)).to(tl.int64))
    between = chosen & (bins != first) & (bins != last)
    tl.atomic_add(histogram_ptr + bins, tl.full(bins.shape, 1, tl.int64), mask=between)


@triton.jit
def bin_of_rank(histogram, rank):
    """The bin of the value of descending rank (from 0), and how many values lie in higher bins."""
    bins = tl.arange(0, BINS)
    higher = tl.sum(histogram) - tl.cumsum(histogram, 0)
    here = (higher <= rank) & (rank < higher + histogram)
    return tl.sum(tl.where(here, bins, 0)).to(tl.int64), tl.sum(tl.where(here, higher, 0))


@triton.jit
def keys_of_ranks(keys, valid, upper, lower):
    """The leading 22 bits of the sampled keys of two descending ranks (from 0), bit by bit from counts."""
    upper_key, lower_key = upper * 0, lower * 0
    for i in range(22):
        bit = (upper * 0 + 1) << (31 - i)
        above_upper = valid & (keys >= (upper_key | bit).to(tl.uint32))
        above_lower = valid & (keys >= (lower_key | bit).to(tl.uint32))
        both = tl.sum((above_upper.to(tl.int32) << 16) + above_lower.to(tl.int32))  # the sample is below 2^15
        upper_key = tl.where((both >> 16) > upper, upper_key | bit, upper_key)
        lower_key = tl.where((both & 0xFFFF) > lower, lower_key | bit, lower_key)
    return upper_key, lower_key


@triton.jit
def bracket(
    layers_ptr,
    chunks_ptr,
    selections_ptr,
    state_ptr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """A selection's state: counts at zero, and a bracket of the threshold, four deviations of a sample either side.

    The sample is runs of 8 scores spread over the chunks as if all were full; what lies past a chunk's end is left out.
    A selection too small for a sample takes all keys for its bracket.
    """
    selection = tl.program_id(0).to(tl.int64)
    row_ptr = selections_ptr + selection * SELECTION_FIELDS
    chunks, keep = tl.load(row_ptr + CHUNKS), tl.load(row_ptr + KEEP)
    state_ptr += selection * STATE
    for i in tl.static_range(COUNTS):
        tl.store(state_ptr + HISTOGRAMS + i * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))
    low, high = chunks * 0, chunks * 0 + LARGEST
    if keep == 0:
        low = high
    elif chunks * BLOCK >= 4 * SAMPLE:
        lane = tl.arange(0, SAMPLE)
        run = lane // 8
        chunk = tl.load(row_ptr + FIRST) + run * chunks // (SAMPLE // 8)
        layer, own = tl.load(chunks_ptr + 2 * chunk).to(tl.int64), tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64)
        place = ((run.to(tl.uint32) * 0x9E3779B9) >> 16).to(tl.int32) % (BLOCK // 8) * 8 + lane % 8
        layer_ptr = layers_ptr + layer * LAYER_FIELDS
        at = own * BLOCK + place
        valid = at < tl.load(layer_ptr + SIZE)
        scores_ptr = tl.load(layer_ptr + SCORES).to(tl.pointer_type(TYPE)) + at
        keys = keys_of(tl.load(scores_ptr, mask=valid, other=0.0), MAGNITUDE)
        sampled = tl.sum(valid.to(tl.int32)).to(tl.int64)
        rank = keep * sampled // tl.load(row_ptr + VALUES)
        margin = (2.0 * tl.sqrt(sampled.to(tl.float32))).to(tl.int64) + 2
        upper, lower = keys_of_ranks(keys, valid, rank - margin, rank + margin)
        high = tl.where(rank >= margin, upper | 1023, high)
        low = tl.where(rank + margin < sampled, lower, low)
    tl.store(state_ptr + LOW, low)
    tl.store(state_ptr + HIGH, high)
    tl.store(state_ptr + ABOVE, chunks * 0)
    tl.store(state_ptr + FOUND, chunks * 0)


@triton.jit
def scan(
    layers_ptr,
    chunks_ptr,
    state_ptr,
    found_ptr,
    list_ptr,
    place_ptr,
    PER_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    TYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Mask what is above the bracket; count what is within it, and list that where it is no more than LIST."""
    layer, chunk = my_chunk(chunks_ptr)
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    row_ptr = layers_ptr + layer * LAYER_FIELDS
    keys, known = load_keys(row_ptr, chunk, lane, BLOCK, TYPE, MAGNITUDE, ALIGNED)
    if PER_LAYER:
        state_ptr += layer * STATE
    low, high = tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH)
    above = known & (keys > high.to(tl.uint32))
    within = known & (keys >= low.to(tl.uint32)) & (keys <= high.to(tl.uint32))
    if not MAGNITUDE:
        tl.store(address(row_ptr, MASK, chunk * BLOCK, tl.int8, ALIGNED) + lane, above.to(tl.int8), mask=known)
    found = tl.sum(within.to(tl.int32))
    tl.store(found_ptr + program, found)
    tl.atomic_add(state_ptr + ABOVE, tl.sum(above.to(tl.int32)).to(tl.int64))
    tl.atomic_add(state_ptr + FOUND, found.to(tl.int64))
    if found <= LIST:
        target = tl.cumsum(within.to(tl.int32), 0) - 1
        tl.store(list_ptr + program * LIST + target, keys.to(tl.int32, bitcast=True), mask=within)
        tl.store(place_ptr + program * LIST + target, lane.to(tl.int16), mask=within)


@triton.jit
def settle_bracket(selections_ptr, state_ptr):
    """The range to search: the bracket where it holds the threshold, else all keys."""
    selection = tl.program_id(0).to(tl.int64)
    state_ptr += selection * STATE
    keep = tl.load(selections_ptr + selection * SELECTION_FIELDS + KEEP)
    need = keep - tl.load(state_ptr + ABOVE)
    hit = (keep == 0) | ((need > 0) & (need <= tl.load(state_ptr + FOUND)))
    tl.store(state_ptr + RANGE_LOW, tl.where(hit, tl.load(state_ptr + LOW), 0))
    tl.store(state_ptr + RANGE_HIGH, tl.where(hit, tl.load(state_ptr + HIGH), LARGEST))
    tl.store(state_ptr + NEED, tl.where(hit, need, keep))
    tl.store(state_ptr + MISSED, tl.where(hit, 0, 1))


@triton.jit
def narrow_range(state_ptr, COUNT: tl.constexpr):
    """From a histogram of the range to the part of it that the threshold's bin holds."""
    state_ptr += tl.program_id(0).to(tl.int64) * STATE
    low, high, need = tl.load(state_ptr + RANGE_LOW), tl.load(state_ptr + RANGE_HIGH), tl.load(state_ptr + NEED)
    if low < high:
        histogram = tl.load(state_ptr + HISTOGRAMS + COUNT * BINS + tl.arange(0, BINS))
        bin, higher = bin_of_rank(histogram, need - 1)
        shift = shift_to_bin(low, high)
        low += bin << shift
        tl.store(state_ptr + RANGE_LOW, low)
        tl.store(state_ptr + RANGE_HIGH, tl.minimum(high, low + (1 << shift) - 1))
        tl.store(state_ptr + NEED, need - higher)


@triton.jit
def count(
    layers_ptr,
    chunks_ptr,
    state_ptr,
    found_ptr,
    list_ptr,
    COUNT: tl.constexpr,
    PER_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    TYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Add a chunk's keys within the range to histogram COUNT."""
    layer, chunk = my_chunk(chunks_ptr)
    program = tl.program_id(0).to(tl.int64)
    if PER_LAYER:
        state_ptr += layer * STATE
    low, high = tl.load(state_ptr + RANGE_LOW), tl.load(state_ptr + RANGE_HIGH)
    found = tl.load(found_ptr + program)
    histogram_ptr = state_ptr + HISTOGRAMS + COUNT * BINS
    if low < high:
        if (found > LIST) | (tl.load(state_ptr + MISSED) != 0):
            lane = tl.arange(0, BLOCK)
            row_ptr = layers_ptr + layer * LAYER_FIELDS
            keys, known = load_keys(row_ptr, chunk, lane, BLOCK, TYPE, MAGNITUDE, ALIGNED)
            within = known & (keys >= low.to(tl.uint32)) & (keys <= high.to(tl.uint32))
            count_bins(histogram_ptr, keys, within, low, high)
        elif found > 0:
            lane = tl.arange(0, LIST)
            listed = tl.load(list_ptr + program * LIST + lane, mask=lane < found, other=0).to(tl.uint32, bitcast=True)
            within = (lane < found) & (listed >= low.to(tl.uint32)) & (listed <= high.to(tl.uint32))
            count_bins(histogram_ptr, listed, within, low, high)


@triton.jit
def count_ties(
    layers_ptr,
    chunks_ptr,
    state_ptr,
    found_ptr,
    list_ptr,
    ties_ptr,
    PER_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """ties[program] = scores of a chunk equal to the threshold."""
    layer, chunk = my_chunk(chunks_ptr)
    program = tl.program_id(0).to(tl.int64)
    if PER_LAYER:
        state_ptr += layer * STATE
    threshold = tl.load(state_ptr + RANGE_LOW).to(tl.uint32)
    found = tl.load(found_ptr + program)
    ties = 0
    if (found > LIST) | (tl.load(state_ptr + MISSED) != 0):
        lane = tl.arange(0, BLOCK)
        keys, known = load_keys(layers_ptr + layer * LAYER_FIELDS, chunk, lane, BLOCK, TYPE, False, ALIGNED)
        ties = tl.sum((known & (keys == threshold)).to(tl.int32))
    elif found > 0:
        lane = tl.arange(0, LIST)
        listed = tl.load(list_ptr + program * LIST + lane, mask=lane < found, other=0).to(tl.uint32, bitcast=True)
        ties = tl.sum(((lane < found) & (listed == threshold)).to(tl.int32))
    tl.store(ties_ptr + program, ties)


@triton.jit
def ties_before(selections_ptr, ties_ptr, BLOCK: tl.constexpr):
    """ties[chunk] becomes the number of ties in the selection's chunks before it."""
    row_ptr = selections_ptr + tl.program_id(0).to(tl.int64) * SELECTION_FIELDS
    chunks = tl.load(row_ptr + CHUNKS)
    ties_ptr += tl.load(row_ptr + FIRST)
    lane = tl.arange(0, BLOCK)
    before = chunks * 0
    for i in range(0, chunks, BLOCK):
        ties = tl.load(ties_ptr + i + lane, mask=i + lane < chunks, other=0)
        tl.store(ties_ptr + i + lane, before + tl.cumsum(ties, 0) - ties, mask=i + lane < chunks)
        before += tl.sum(ties)


@triton.jit
def mark(
    layers_ptr,
    chunks_ptr,
    state_ptr,
    found_ptr,
    list_ptr,
    place_ptr,
    ties_ptr,
    PER_LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """True above the threshold, and for as many ties, in order, as are kept."""
    layer, chunk = my_chunk(chunks_ptr)
    program = tl.program_id(0).to(tl.int64)
    row_ptr = layers_ptr + layer * LAYER_FIELDS
    if PER_LAYER:
        state_ptr += layer * STATE
    threshold = tl.load(state_ptr + RANGE_LOW).to(tl.uint32)
    left = tl.load(state_ptr + NEED) - tl.load(ties_ptr + program)
    found = tl.load(found_ptr + program)
    mask_ptr = address(row_ptr, MASK, chunk * BLOCK, tl.int8, ALIGNED)
    if (found > LIST) | (tl.load(state_ptr + MISSED) != 0):
        lane = tl.arange(0, BLOCK)
        keys, known = load_keys(row_ptr, chunk, lane, BLOCK, TYPE, False, ALIGNED)
        tie = known & (keys == threshold)
        kept = (keys > threshold) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= left))
        tl.store(mask_ptr + lane, kept.to(tl.int8), mask=known)
    elif found > 0:
        lane = tl.arange(0, LIST)
        listed = tl.load(list_ptr + program * LIST + lane, mask=lane < found, other=0).to(tl.uint32, bitcast=True)
        tie = (lane < found) & (listed == threshold)
        kept = (lane < found) & ((listed > threshold) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= left)))
        place = tl.load(place_ptr + program * LIST + lane, mask=kept, other=0)
        tl.store(mask_ptr + place, tl.full([LIST], 1, tl.int8), mask=kept)
