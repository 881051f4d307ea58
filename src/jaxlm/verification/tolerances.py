"""How far apart two answers may be, and why. Errors of hidden states and logits are in the reference's deviations."""

from typing import NamedTuple


class Limits(NamedTuple):
    """worst, rms: of hidden states and logits, in deviations; kl: mean nats a position."""

    worst: float
    rms: float
    kl: float


# float32: products are summed in another order than the reference's; over the families and full-width layers measured
# (docs/verification.md) the worst is 2e-5. The faults that implementations have had move logits by 1e-2 or more, so
# the limit stands between, nearer to the noise. It holds on every device because float32 products keep full
# precision there (Precision.HIGHEST); a device that cut them to bfloat16 or TF32 would err by 1e-3 and fail.
# A shift of d deviations in logits of deviation s costs about (d s)^2 / 2 nats; with s up to 10 that is 5e-7.
EXACT = Limits(worst=1e-4, rms=2e-5, kl=1e-6)

# bfloat16 and float16 round at every step, in another order than the reference does: held against the reference's own
# error in that type (from its own float32), times this factor. Over few positions the ratio of two such errors, each
# made of independent roundings, stays below 2; a wrong cast (a norm in bfloat16) doubles or more.
OWN_ERROR = 2.0

# jaxlm against itself: RMS of logits, in deviations. In float32 as above. In bfloat16 and float16 a cached and a whole
# run sum in another order and then round, 2**-8 and 2**-11 at a time; over tens of layers that adds up to some steps.
ITSELF = {"float32": EXACT.rms, "bfloat16": 8 * 2**-8, "float16": 8 * 2**-11}

# Units in the last place between frequencies: numpy, XLA and torch differ by one in a quarter of them.
ULPS = 2
# Meta's code keeps cos and sin only: reading the angle back costs as much again.
ULPS_READ_BACK = 4
