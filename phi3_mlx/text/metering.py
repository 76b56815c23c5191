"""A Jinja sandbox that counts the work of a rendering, and stops a template that does too much.

Every step of a loop, every call and every new character or item costs something, and a rendering may spend a fixed
amount, the same on every machine and in any thread. An operation that could make something huge at once
(`'a' * 10**10`, `center`, `'%9999999d'`, `10 ** 10 ** 9`) is paid for before it runs. Lists within lists count as often
as they would be printed, so that forty lines of `{% set a = [a, a] %}` cost what their text would.

This module imports jinja2; import it inside the function that needs it.
"""

import functools
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import generate_lorem_ipsum, pass_context, pass_eval_context
from jinja2.visitor import NodeTransformer

from ..errors import ChatError
from . import growth
from .growth import DEEPEST_LISTS, ITEM, TEXT, count

_ALLOWED = 20_000_000  # a rendering of short messages; a loop that does nothing takes about two seconds to spend it
_ALLOWED_A_CHARACTER = 100  # of the messages in addition; templates in use spend 3 to 12
_ALLOWED_A_PAIR = 20  # of messages: some templates go through all of them for each
_MOST_BITS = 16_384  # of an integer
_STEP, _CALL, _FILTER = 4, 100, 25  # what a step of a loop, a call and a filter cost in addition to their work
_SMALL_CONTAINER = 64  # the weight of containers that cost more is cached

_KEPT = (list, tuple, dict)
_CONTAINERS = (*_KEPT, KeysView, ValuesView, ItemsView)
_SEQUENCES = (*TEXT, list, tuple)

_meter: ContextVar["Meter"] = ContextVar("meter")


class Meter:
    """The budget of a rendering. `with Meter(size, messages):` meters what this thread renders in the block."""

    def __init__(self, size: int, messages: int):
        """`size`: characters of the messages and of what else the template is given; `messages`: how many they are."""
        self.allowed = self.left = _ALLOWED + _ALLOWED_A_CHARACTER * size + _ALLOWED_A_PAIR * messages**2
        self._weights: dict[int, tuple[Any, int, int]] = {}  # id: the container (kept, so that it keeps its id), ...

    def __enter__(self) -> "Meter":
        self._token = _meter.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _meter.reset(self._token)

    def spend(self, amount: int) -> None:
        """Raises ChatError if that is more than is left."""
        self.left -= amount
        if self.left < 0:
            raise ChatError(
                f"the chat template was stopped: it does more than {self.allowed:,} steps for these messages, which no "
                "ordinary template needs; use another copy of the model's files, or send raw text"
            )

    def weigh(self, value: Any) -> int:
        """About how long the text of `value` is, which is also the work of a pass through all of it."""
        return self._weigh(value, 0)[0]

    def _weigh(self, value: Any, depth: int) -> tuple[int, int]:
        """The weight, and how deep lists are nested in it."""
        if isinstance(value, TEXT):
            return len(value) + 1, 0
        if not isinstance(value, _CONTAINERS):
            return len(value) * ITEM if isinstance(value, range) else ITEM, 0
        if (known := self._weights.get(id(value))) is not None:
            weight, height = known[1:]
        else:
            weight, height = ITEM * (1 + len(value)), 0
            parts = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
            for part in parts:
                if type(part) is str:
                    weight += len(part)
                elif isinstance(part, _CONTAINERS):
                    below, high = self._weigh(part, depth + 1) if depth < DEEPEST_LISTS else (0, DEEPEST_LISTS)
                    weight, height = weight + below, max(height, high + 1)
                if weight > self.allowed:
                    self.spend(weight)
            if weight > _SMALL_CONTAINER and isinstance(value, _KEPT):
                self._weights[id(value)] = value, weight, height
        if depth + height > DEEPEST_LISTS:
            raise ChatError(f"the chat template was stopped: its lists are nested more than {DEEPEST_LISTS} deep")
        return weight, height

    def pay_for(self, value: Any) -> Any:
        """Pay for `value`, which was just made, and return it."""
        if isinstance(value, TEXT):
            self.spend(len(value))
        elif isinstance(value, _KEPT):
            self.weigh(value)  # raises for one that is too large or too deep
            self.spend(ITEM * (2 + len(value)))
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        return value

    def check_bits(self, bits: int) -> None:
        """Raises ChatError if an integer of this many bits is too large."""
        if bits > _MOST_BITS:
            raise ChatError(f"the chat template was stopped: it makes an integer of {bits:,} bits")


def pay_for(value: Any) -> Any:
    """Charge this thread's rendering for `value`, which was just made, and return it."""
    return _meter.get().pay_for(value)


def extent(value: Any) -> int:
    """About how many characters lists and mappings have."""
    if isinstance(value, TEXT):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + extent(part) for key, part in value.items())
    return sum(map(extent, value)) if isinstance(value, (list, tuple)) else 1


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, whose templates can be rendered only within a `Meter`."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, **options: Any):
        # Nothing is computed while a template is compiled: no meter runs then.
        super().__init__(optimized=False, finalize=_shown, **options)
        filters: dict[str, Any] = dict(FILTERS)
        tests: dict[str, Any] = dict(TESTS)
        self.filters = {name: metered(name, function) for name, function in filters.items()} | _HOOKS
        self.tests = tests | {name: metered(name, tests[name]) for name in _COMPARING}
        self.globals["lipsum"] = _lipsum

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        counted = _Hooks().visit(source)
        counted.set_environment(self)
        return super()._generate(counted, name, filename, defer_init)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator that could make something large of something small."""
        meter = _meter.get()
        if operator == "*":
            many, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(many, _SEQUENCES) and isinstance(times, int):
                meter.spend((len(many) + 1) * max(times, 0) * (1 if isinstance(many, TEXT) else ITEM))
        elif operator == "%" and isinstance(left, TEXT):
            meter.spend(growth.printf_size(meter.weigh, left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
            meter.check_bits(left.bit_length() * right)
        return meter.pay_for(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function's or a method's result."""
        meter = _meter.get()
        meter.spend(_CALL + ITEM * (len(args) + len(kwargs)))
        named = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # not Jinja's own
        for value in (*args, *named.values()):
            meter.weigh(value)  # what a macro makes of its arguments is a list as well
        if isinstance(__obj, LoopContext):  # the next level of a recursive loop
            args = (_Steps(args[0], _STEP), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (int, *_SEQUENCES)):
            if name == "join" and args and isinstance(args[0], Iterator):
                args = ([*args[0]], *args[1:])
            meter.spend(meter.weigh(owner))
            if (size := growth.METHOD_SIZES.get(name)) is not None:
                meter.spend(int(size(meter.weigh, owner, *args, **named)))
        return meter.pay_for(super().call(__context, __obj, *args, **kwargs))


class _Steps:
    """What a loop goes through, each step paid for."""

    def __init__(self, items: Any, cost: int):
        self._items, self._cost = items, cost

    def __iter__(self) -> Iterator[Any]:
        spend, cost = _meter.get().spend, self._cost
        for item in self._items:
            spend(cost)
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Hooks(NodeTransformer):
    """Inserts the metering into a template's tree: filters whose names no template can spell."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """A step costs as much as the loop's body is long."""
        self.generic_visit(node)
        size = _STEP + _length(node.body)
        if node.recursive:  # its body is a function, which is called from within as well
            node.body.insert(0, _paid(size, node.lineno))
        node.iter = _hooked(node.iter, "a step", nodes.Const(_STEP if node.recursive else size))
        return node

    def _function(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _paid(_length(node.body), node.lineno))
        return node

    visit_Template = visit_Macro = visit_CallBlock = visit_Block = _function

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hooked(nodes.Tuple(node.nodes, "load", lineno=node.lineno), "a text")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """Equality with a constant, by far the most frequent one, is short already."""
        self.generic_visit(node)
        sides = [node.expr, *(op.expr for op in node.ops)]
        if "in" in " ".join(op.op for op in node.ops) or not any(isinstance(side, nodes.Const) for side in sides):
            node.expr = _hooked(node.expr, "an operand")
            for op in node.ops:
                op.expr = _hooked(op.expr, "a place" if op.op in ("in", "notin") else "an operand")
        return node

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        constant = all(isinstance(child, nodes.Const) for child in node.iter_child_nodes())
        return node if stored or constant else _hooked(node, "a value")

    visit_List = visit_Tuple = visit_Dict = _made

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _hooked(node, "a value") if isinstance(node.arg, nodes.Slice) else node


def _hooked(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _paid(amount: int, lineno: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_hooked(nodes.Const(amount, lineno=lineno), "a payment"), lineno=lineno)


def _length(body: list[nodes.Node]) -> int:
    """How much work a body takes: expressions and statements in it, and the text that it writes."""
    inside = [child for node in body for child in (node, *node.find_all(nodes.Node))]
    return len(inside) + sum(len(child.data) for child in inside if isinstance(child, nodes.TemplateData))


@pass_eval_context
def _text(eval_context: Any, parts: tuple[Any, ...]) -> str:
    meter = _meter.get()
    meter.spend(sum(map(meter.weigh, parts)))
    return markup_join(parts) if eval_context.autoescape else str_join(parts)


def _operand(value: Any) -> Any:
    meter = _meter.get()
    meter.spend(meter.weigh(value) // ITEM)
    return value


def _place(value: Any) -> Any:
    """Where something is looked for: by its hash in a mapping, else one by one."""
    return value if isinstance(value, Mapping) else _operand(value)


@pass_context
def _shown(_context: Any, value: Any) -> Any:
    """What `{{ value }}` writes. It takes the context so that Jinja does not call it while it compiles."""
    meter = _meter.get()
    meter.spend(meter.weigh(value))
    return value


_HOOKS: dict[str, Callable[..., Any]] = {
    "a step": _Steps,
    "a text": _text,
    "an operand": _operand,
    "a place": _place,
    "a value": pay_for,
    "a payment": lambda amount: _meter.get().spend(amount),
}

# Filters that look at one item, and at the items alone; all others are taken to read all that is in them.
_AT_ONCE = frozenset(["attr", "count", "d", "default", "first", "items", "last", "length", "random"])
_SHALLOW = frozenset(["batch", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"])
# Filters that use up what they are given, whose size has to be known before.
_CONSUMING = frozenset(["join", "sort", "unique", "groupby", "sum", "min", "max", "slice"])
_COMPARING = frozenset(["in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt",
                        "lessthan", "<=", "le", "lower", "upper"])  # fmt: skip


def metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that pays for what it reads, for what it could make of it, and for what it makes."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0  # of the value among the arguments

    @functools.wraps(function)
    def counted(*given: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        before, (value, *args) = given[:place], given[place:]
        if name in _CONSUMING and isinstance(value, Iterator):
            value = list(value)
        for other in (*args, *kwargs.values()):
            meter.weigh(other)
        meter.spend(_FILTER + ITEM * (len(args) + len(kwargs)))
        if name in _SHALLOW:
            meter.spend(ITEM * count(value))
        elif name not in _AT_ONCE:
            meter.spend(sum(map(meter.weigh, (value, *args, *kwargs.values()))))
        if (size := growth.FILTERS.get(name)) is not None:
            meter.spend(int(size(meter.weigh, value, *args, **kwargs)))
        return meter.pay_for(function(*before, value, *args, **kwargs))

    return counted


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    _meter.get().spend(1_000 * n * max)
    return generate_lorem_ipsum(n, html, min, max)
