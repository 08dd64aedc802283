"""Arithmetics for the operators' formulas (formulas.py): a kernel's, one with an injected fault, and error bounds.

`Arithmetic` computes like a kernel: sums, products and exponentials in float32. Stored numbers, such as an operand of a
matrix product or a result, have the dtype that the formula names. `Faulty` does the same with one fault at one place.
`Bounds` tracks the largest error of a right kernel beside every number. This running error analysis (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd edition, section 3.3) holds for any order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Unit roundoff: half the distance from 1 to the next number.
UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float16, torch.bfloat16)}
U = UNIT[torch.float32]


def growth(terms: int) -> float:
    """gamma_n = n u / (1 - n u): the largest relative error of a float32 sum of n terms, in any order.

    Tensor cores truncate instead of rounding, which costs at most one unit per addition.
    """
    return (terms + 2) * U / (1 - (terms + 2) * U)


class Arithmetic:
    """Arithmetic on float32 tensors."""

    def start(self) -> None:
        """Called when the formula begins, and again for each further sequence."""

    def load(self, tensor: Tensor) -> Any:
        return tensor.float()

    def stored(self, number: Any, dtype: torch.dtype) -> Any:
        return number.to(dtype).float()

    def dot(self, left: Any, right: Any) -> Any:
        return left @ right

    def total(self, number: Any, dim: int) -> Any:
        return number.sum(dim, keepdim=True)

    def exp(self, number: Any, offset: Any, size: float = 0.0) -> Any:
        """exp(number - offset). A kernel may subtract another offset of at most `size`, and correct by a factor."""
        near = offset.float()
        return (number - near).clamp(max=80.0).exp() * (near - offset).exp().float()

    def log(self, number: Any) -> Any:
        """The logarithm in float64, because the rounding of a log-sum-exp is that of every exponential in its row."""
        return number.double().log()

    def rsqrt(self, number: Any) -> Any:
        return number.rsqrt()

    def softplus_and_sigmoid(self, number: Any) -> tuple[Any, Any]:
        small = self.exp(-number.abs(), torch.zeros_like(number))
        return number.relu() + small.log1p(), torch.where(number > 0, 1.0, small) / (1 + small)

    def normal_cdf(self, number: Any) -> Any:
        """Abramowitz and Stegun 7.1.26, like the C++ kernels and torch's vectorized code."""
        distance = number.abs() * 0.5**0.5
        t = 1 / (1 + 0.3275911 * distance)
        terms = zip((0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429), range(1, 6), strict=True)
        series = self.total(self.stack([factor * t**power for factor, power in terms]), -1)[..., 0]
        tail = 0.5 * series * self.exp(-distance * distance, torch.zeros_like(distance))
        return torch.where(number < 0, tail, 1 - tail)

    def cat(self, numbers: list[Any]) -> Any:
        return torch.cat(numbers)

    def stack(self, numbers: list[Any]) -> Any:
        return torch.stack(numbers, -1)

    def value(self, number: Any) -> Tensor:
        return number


class Faulty(Arithmetic):
    """A kernel with one injected fault.

    Args:
        fault: a dtype in which a sum is accumulated, or "lost term", or the relative error of the exponential's factor
            log2(e). "lost term" drops the last term of a sum.
        site: index of the fault's place among all places of its kind. -1 for no fault.
    """

    def __init__(self, fault: torch.dtype | str | float, site: int = -1) -> None:
        self.fault, self.site, self.num_sites = fault, site, 0

    def start(self) -> None:
        self.num_sites = 0

    def _here(self, terms: int = 0) -> bool:
        """Whether the fault occurs at this place. `terms` is the number of terms of a sum, or 0 for an exponential."""
        if isinstance(self.fault, float) != (terms == 0) or terms == 1:
            return False
        self.num_sites += 1
        return self.num_sites - 1 == self.site

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        if not self._here(left.shape[-1]):
            return super().dot(left, right)
        if self.fault == "lost term":
            left = left.clone()
            left[..., -1] = 0
            return left @ right
        return self._accumulated(left[..., :, :, None] * right[..., None, :, :], -2)

    def total(self, number: Tensor, dim: int) -> Tensor:
        if not self._here(number.shape[dim]):
            return super().total(number, dim)
        if self.fault == "lost term":
            return number.narrow(dim, 0, number.shape[dim] - 1).sum(dim, keepdim=True)
        return self._accumulated(number, dim).unsqueeze(dim)

    def _accumulated(self, terms: Tensor, dim: int) -> Tensor:
        sums = torch.zeros_like(terms.select(dim, 0))
        for term in terms.unbind(dim):
            sums = (sums + term).to(self.fault).float()
        return sums

    def exp(self, number: Tensor, offset: Tensor, size: float = 0.0) -> Tensor:
        if self._here():
            return ((number - offset.float()) * (1 + self.fault)).clamp(max=80.0).exp()
        return super().exp(number, offset)


class Approximate:
    """A float64 value and the largest error of a float32 kernel."""

    def __init__(self, value: Tensor, error: Tensor | None = None) -> None:
        self.value = value
        self.error = torch.zeros_like(value) if error is None else error

    @staticmethod
    def of(number: Any) -> Approximate:
        if isinstance(number, Approximate):
            return number
        return Approximate(torch.as_tensor(number, dtype=torch.float64))

    @staticmethod
    def rounded(value: Tensor, error: Tensor) -> Approximate:
        """The result of one operation. The second unit is for a constant in it, which is rounded too."""
        return Approximate(value, error + 2 * U * value.abs())

    def __add__(self, other: Any) -> Approximate:
        other = self.of(other)
        return self.rounded(self.value + other.value, self.error + other.error)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Approximate:
        other = self.of(other)
        return self.rounded(self.value - other.value, self.error + other.error)

    def __rsub__(self, other: Any) -> Approximate:
        return self.of(other) - self

    def __neg__(self) -> Approximate:
        return Approximate(-self.value, self.error)

    def __mul__(self, other: Any) -> Approximate:
        other = self.of(other)
        size, change = self.value.abs() * other.error, self.error * (other.value.abs() + other.error)
        return self.rounded(self.value * other.value, size + change)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Approximate:
        other = self.of(other)
        value, least = self.value / other.value, other.value.abs() - other.error
        assert (least > 0).all(), "the error analysis divides by a number that may be zero"
        return self.rounded(value, (self.error + value.abs() * other.error) / least)

    def __getitem__(self, index: Any) -> Approximate:
        return Approximate(self.value[index], self.error[index])

    def reshape(self, *shape: Any) -> Approximate:
        return Approximate(self.value.reshape(*shape), self.error.reshape(*shape))

    def transpose(self, one: int, other: int) -> Approximate:
        return Approximate(self.value.transpose(one, other), self.error.transpose(one, other))

    @property
    def mT(self) -> Approximate:
        return self.transpose(-2, -1)


class Bounds(Arithmetic):
    """Arithmetic on `Approximate` numbers."""

    def load(self, tensor: Tensor) -> Approximate:
        return Approximate(tensor.double())

    def stored(self, number: Approximate, dtype: torch.dtype) -> Approximate:
        if dtype == torch.float32:
            return number
        # Results below the smallest normal number also err by half the smallest subnormal number.
        information = torch.finfo(dtype)
        rounding = UNIT[dtype] * (number.value.abs() + number.error) + information.smallest_normal * information.eps / 2
        return Approximate(number.value, number.error + rounding)

    def dot(self, left: Any, right: Any) -> Approximate:
        left, right = Approximate.of(left), Approximate.of(right)
        sizes = left.value.abs(), right.value.abs()
        exact = sizes[0] @ sizes[1]
        changed = (sizes[0] + left.error) @ (sizes[1] + right.error) - exact
        return Approximate(left.value @ right.value, changed + growth(left.value.shape[-1]) * exact)

    def total(self, number: Approximate, dim: int) -> Approximate:
        sizes = number.error + growth(number.value.shape[dim]) * (number.value.abs() + number.error)
        return Approximate(number.value.sum(dim, keepdim=True), sizes.sum(dim, keepdim=True))

    def exp(self, number: Any, offset: Any, size: float = 0.0) -> Approximate:
        """2^(number * log2(e) - offset * log2(e)). Rounding both products and the difference costs three units of their
        sizes, and the exponential itself costs eight units."""
        number, offset = Approximate.of(number), Approximate.of(offset)
        value = (number.value - offset.value).clamp(max=80.0).exp()
        argument = number.error + offset.error + 3 * U * (number.value.abs() + offset.value.abs() + size)
        return Approximate(value, value * torch.expm1(argument + 8 * U))

    def log(self, number: Approximate) -> Approximate:
        value = number.value.log()
        return Approximate(value, number.error / (number.value - number.error) + 4 * U * (1 + value.abs()))

    def rsqrt(self, number: Approximate) -> Approximate:
        value = number.value.rsqrt()
        return Approximate(value, value * (number.error / (number.value - number.error) / 2 + 4 * U))

    def softplus_and_sigmoid(self, number: Approximate) -> tuple[Approximate, Approximate]:
        """Bounds by the slopes, which are at most 1 and 1/4, and as small as the sigmoid itself in the tail."""
        softplus, sigmoid = torch.nn.functional.softplus(number.value, threshold=50), number.value.sigmoid()
        argument = number.error + 3 * U * number.value.abs()
        steepest = (number.value + argument).sigmoid()
        return (
            Approximate(softplus, steepest * argument + 8 * U * softplus),
            Approximate(sigmoid, steepest * argument + 8 * U * sigmoid),
        )

    def normal_cdf(self, number: Approximate) -> Approximate:
        """The series errs by at most 0.75e-7, which is 1.3 units. Its terms have six roundings each.

        Half the sum of the terms' sizes is at most 2.25, and the slope is at most 0.4.
        """
        return Approximate(torch.special.ndtr(number.value), 0.4 * number.error + (1.3 + 6 * 2.25) * U)

    def cat(self, numbers: list[Approximate]) -> Approximate:
        values, errors = zip(*((number.value, number.error) for number in numbers), strict=True)
        return Approximate(torch.cat(values), torch.cat(errors))

    def stack(self, numbers: list[Approximate]) -> Approximate:
        values, errors = zip(*((number.value, number.error) for number in numbers), strict=True)
        return Approximate(torch.stack(values, -1), torch.stack(errors, -1))

    def value(self, number: Any) -> Tensor:
        return number.value
