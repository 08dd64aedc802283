"""Select samples by an expression over the columns of the manifest, such as `kind in ['ct', 'mr'] and kind_p > 0.5`.

The expression has the syntax of Python: `and`, `or`, `not`, comparisons, `in` with a list, texts, numbers, True, False
and None. A name is a column, and `p` is short for `kind_p`. `x == None`, or `x is null`, is true where a row has no
value. Every other comparison with a missing value is neither true nor false, as in SQL, so neither it nor its negation
selects the row.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bclip_fast.errors import UserError, choices

# The value of the setting that selects all samples, whatever the dataset's own filter is.
ALL = "all"
_ALIASES = {"p": "kind_p"}
_MAX_LENGTH = 2000
# and, or and not inside one another. Each level takes several calls, here and in ast.unparse.
_MAX_DEPTH = 100
_COMPARISONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


@dataclass(frozen=True)
class Filter:
    """A parsed expression. `columns`: the columns that it reads."""

    text: str
    columns: tuple[str, ...]

    def mask(self, table: Any) -> np.ndarray:
        """Return which rows (n,) bool of an Arrow table are selected.

        Raises:
            UserError: a column is missing, or has another type than the expression needs.
        """
        return _mask(self.text, _parse(self.text), table)

    def counts(self, table: Any) -> list[tuple[str, int]]:
        """Return (part, number of rows that it selects) of each part that `and` joins."""
        tree = _parse(self.text)
        parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        return [(ast.unparse(part), int(_mask(self.text, part, table).sum())) for part in parts]

    def check_columns(self, names: Iterable[str], source: str) -> None:
        """Raise UserError if `source`, whose columns are `names`, lacks a column of the expression."""
        names = list(names)
        for column in self.columns:
            if column in names:
                continue
            hint = "; bclip ingest label writes it" if column in ("kind", "kind_p", "kind_by") else ""
            raise UserError(f"filter {self.text!r}: {source} has no column {column}{hint}{choices(column, names)}")


def parse(text: str) -> Filter:
    """Return the filter that a text describes.

    Raises:
        UserError: the text is not an expression, or uses more than the module's description allows.
    """
    columns: dict[str, None] = {}
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Name):
            columns[_ALIASES.get(node.id, node.id)] = None
    if not columns:
        raise UserError(f"filter {text!r} names no column of the manifest")
    return Filter(text, tuple(columns))


def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_LENGTH:
        raise UserError(f"a filter of {len(text)} characters is too long; the limit is {_MAX_LENGTH}")
    try:
        tree: ast.expr = _Nulls().visit(ast.parse(text.strip(), mode="eval").body)
        _check(text, tree)
    except UserError:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(
            f"filter {text!r} is not an expression: {error}; e.g. kind in ['ct', 'mr'] and p > 0.5"
        ) from None
    return tree


class _Nulls(ast.NodeTransformer):
    """Replaces the name `null` by None."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(None) if node.id == "null" else node


def _check(text: str, node: ast.expr, depth: int = 0) -> None:
    """Raise UserError if a part of the expression isn't allowed."""
    if depth > _MAX_DEPTH:
        raise UserError(f"a filter with and, or, not nested more than {_MAX_DEPTH} deep is too deep; write it flatter")
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(text, value, depth + 1)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(text, node.operand, depth + 1)
    elif isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            if isinstance(operator, ast.In | ast.NotIn):
                _check_operand(text, left)
                _list(text, right)
            elif type(operator) in _COMPARISONS or isinstance(operator, ast.Is | ast.IsNot):
                _check_operand(text, left)
                _check_operand(text, right)
                if isinstance(operator, ast.Is | ast.IsNot) and not _is_none(right):
                    raise UserError(f"filter {text!r}: `is` only compares with None; use ==")
            else:
                _refuse(text, operator)
    elif not isinstance(node, ast.Name):
        _refuse(text, node)


def _check_operand(text: str, node: ast.expr) -> None:
    if not isinstance(node, ast.Name):
        _constant(text, node)


def _refuse(text: str, node: ast.AST) -> None:
    shown = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
    raise UserError(
        f"filter {text!r}: {shown!r} isn't allowed; use and, or, not, comparisons, `in` with a list, texts and numbers"
    )


def _constant(text: str, node: ast.expr) -> Any:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not isinstance(inner, ast.Constant) or not isinstance(inner.value, str | int | float | bool | None):
        _refuse(text, node)
    value = inner.value  # type: ignore[attr-defined]
    if negative and (isinstance(value, bool) or not isinstance(value, int | float)):
        _refuse(text, node)
    return -value if negative else value


def _list(text: str, node: ast.expr) -> list[Any]:
    if not isinstance(node, ast.List | ast.Tuple | ast.Set):
        raise UserError(f"filter {text!r}: `in` needs a list, such as ['ct', 'mr'], and not {ast.unparse(node)}")
    return [_constant(text, item) for item in node.elts]


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _mask(text: str, node: ast.expr, table: Any) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        value = _truth(text, node, table)
        mask: np.ndarray = np.asarray(pc.fill_null(value, False))
        return mask
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"filter {text!r} doesn't fit the types of its columns: {first}") from None


def _truth(text: str, node: ast.expr, table: Any) -> Any:
    """Return the values of an expression, one a row, true, false or null. and, or and not follow Kleene's logic."""
    import pyarrow.compute as pc

    if isinstance(node, ast.Name):
        if (type_name := _type_name(_column(node, table).type)) != "true or false":
            raise UserError(f"filter {text!r}: the column {node.id} is {type_name}, not true or false; compare it")
        return _column(node, table)
    if isinstance(node, ast.BoolOp):
        join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        return functools.reduce(join, [_truth(text, part, table) for part in node.values])
    if isinstance(node, ast.UnaryOp):
        return pc.invert(_truth(text, node.operand, table))
    assert isinstance(node, ast.Compare)
    operands = [node.left, *node.comparators]
    parts = zip(operands, node.ops, operands[1:], strict=False)
    return functools.reduce(pc.and_kleene, [_comparison(text, *part, table) for part in parts])


def _comparison(text: str, left: ast.expr, operator: ast.cmpop, right: ast.expr, table: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = _operand(text, left, table)
    if isinstance(operator, ast.In | ast.NotIn):
        return _membership(text, left, isinstance(operator, ast.NotIn), _list(text, right), values)
    if _is_none(right) or _is_none(left):
        if not isinstance(operator, ast.Eq | ast.NotEq | ast.Is | ast.IsNot):
            raise UserError(f"filter {text!r}: None has no order; use == None or != None")
        missing = pc.is_null(_operand(text, left if _is_none(right) else right, table))
        return pc.invert(missing) if isinstance(operator, ast.NotEq | ast.IsNot) else missing
    others = _operand(text, right, table)
    types = values.type, others.type
    if not any(map(pa.types.is_null, types)) and _type_name(types[0]) != _type_name(types[1]):
        shown = f"{ast.unparse(left)} is {_type_name(types[0])}, and {ast.unparse(right)} is {_type_name(types[1])}"
        raise UserError(f"filter {text!r}: {shown}; compare values of one type")
    names = {"==": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal"}
    return pc.call_function(names[_COMPARISONS[type(operator)]], [values, others])


def _membership(text: str, left: ast.expr, negated: bool, items: list[Any], values: Any) -> Any:
    """Return whether the values are among items. Without None among the items, a missing value gives null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = [item for item in items if item is not None]
    if pa.types.is_null(values.type):
        known = []
    for item in known:
        if (item_type := _type_name(pa.scalar(item).type)) != _type_name(values.type):
            raise UserError(
                f"filter {text!r}: {ast.unparse(left)} is {_type_name(values.type)}, and {item!r} in its list is "
                f"{item_type}; compare values of one type"
            )
    if pa.types.is_integer(values.type):
        known = [int(item) for item in known if item == int(item)]
    missing = pc.is_null(values)
    found = pc.is_in(values, pa.array(known, values.type))
    found = pc.or_(found, missing) if None in items else pc.if_else(missing, pa.scalar(None, pa.bool_()), found)
    return pc.invert(found) if negated else found


def _operand(text: str, node: ast.expr, table: Any) -> Any:
    """Return a column, or a constant as a column of the table's length."""
    import pyarrow as pa

    if isinstance(node, ast.Name):
        return _column(node, table)
    return pa.chunked_array([pa.repeat(pa.scalar(_constant(text, node)), len(table))])


def _column(node: ast.Name, table: Any) -> Any:
    return table[_ALIASES.get(node.id, node.id)]


def _type_name(arrow_type: Any) -> str:
    """Return what the values of an Arrow type are, for messages."""
    import pyarrow as pa

    if pa.types.is_boolean(arrow_type):
        return "true or false"
    if pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type):
        return "a number"
    return "text" if pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) else str(arrow_type)
