"""The quantiles of Student's t."""

import functools
import math


@functools.lru_cache(maxsize=4096)
def t_quantile(df, level=0.95):
    """The two-sided quantile of Student's t, by bisection on its distribution function (the
    incomplete beta function as a continued fraction: Numerical Recipes 6.4)."""
    def tail(t):  # P(|T| > t)
        return incomplete_beta(df / 2, 0.5, df / (df + t * t))

    low = 0.0
    high = 20.0
    while tail(high) > 1 - level:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if tail(middle) > 1 - level:
            low = middle
        else:
            high = middle
    return high


def incomplete_beta(a, b, x):
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
                     + a * math.log(x) + b * math.log(1 - x))
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    c = 1.0
    d = 0.0
    for i in range(300):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        fraction *= c * d
        if abs(1 - c * d) < 1e-12:
            break
    return scale * (fraction - 1) / a
