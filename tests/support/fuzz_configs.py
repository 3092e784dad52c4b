"""Random values for the fields of every config, sensible and not, for hypothesis."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st

from attnopt import Every, First, NthLast, Window
from attnopt.attention import MECHANISMS

SMALL = st.integers(0, 12)
NONSENSE = st.sampled_from([-1, 1.5, True, float("nan"), "text", "", (), [], {}, object(), 2000])
WORDS: dict[str, tuple[str, ...]] = {
    "init": ("zeros", "random", "mean"),
    "backend": ("auto", "eager", "reference", "triton"),
    "feature_map": ("favor", "hedgehog", "exp", "relu", "taylor"),
    "norms": ("chi", "constant"),
    "stabilizer": ("running", "static"),
    "combine": ("merged", "gates"),
    "compression": ("mean", "weighted", "mlp"),
    "regime": ("auto", "short", "long"),
}
CANDIDATES = st.lists(
    st.one_of(
        st.builds(NthLast, st.integers(0, 9)),
        st.builds(Window, st.integers(1, 9)),
        st.builds(First, st.integers(1, 5)),
        st.just(Every()),
        st.sampled_from([Every, "window", 3, None]),
    ),
    max_size=4,
)


@st.composite
def config_arguments(draw: Callable) -> tuple[type, dict[str, Any], tuple, int]:
    """A config's class, values for some of its fields, sizes of a layer, and a seed."""
    cls = MECHANISMS[draw(st.sampled_from(sorted(MECHANISMS)))]
    chosen = [field for field in fields(cls) if draw(st.booleans())]
    odd = draw(st.sampled_from([None, None, None, *(f.name for f in chosen)]))
    values = {}
    for field in chosen:
        if field.name == odd:
            values[field.name] = draw(NONSENSE)
        elif field.name == "candidates":
            values[field.name] = draw(CANDIDATES)
        elif field.name in WORDS:
            values[field.name] = draw(st.sampled_from(WORDS[field.name]))
        elif isinstance(field.default, bool):
            values[field.name] = draw(st.booleans())
        else:
            values[field.name] = draw(st.one_of(SMALL, SMALL, st.none(), st.booleans()))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    dim, length = draw(st.sampled_from([1, 3, 8])), draw(st.integers(1, 30))
    sizes = (kv_heads * groups, kv_heads, dim, length, draw(st.sampled_from([True, True, False])))
    return cls, values, sizes, draw(st.integers(0, 99))
