"""Messages that quote untrusted names."""

from hypothesis import example, given
from hypothesis import strategies as st

from shards.errors import SampleError, ShardError, printable
from streamtrain.errors import StreamtrainError


@given(st.text(alphabet=st.characters(), max_size=40))
@example("\x1b]0;title\x07\x1b[2J")
@example("caf\udce9")
@example("two\nlines")
def test_any_text_becomes_one_line_that_any_terminal_can_show(text: str) -> None:
    for shown in (
        printable(text),
        str(ShardError(text)),
        str(SampleError(text, 0, text, text)),
        str(StreamtrainError(text)),
    ):
        assert shown.isprintable()
        assert shown.encode() is not None  # no lone surrogate is left


def test_readable_text_is_left_as_it_is() -> None:
    assert printable("été 日本.jpg") == "été 日本.jpg"
