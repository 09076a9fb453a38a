"""Messages that quote untrusted names."""

import errno

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shards.errors import SampleError, ShardError, explain_os_error, is_source_failure, printable
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


@pytest.mark.parametrize("name", ["ESTALE", "ENOTCONN", "ETIMEDOUT", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM"])
def test_errors_of_a_whole_file_system_are_told_from_those_of_an_image(name: str) -> None:
    assert is_source_failure(OSError(getattr(errno, name), "reason"))


def test_errors_of_one_file_are_no_failure_of_the_source() -> None:
    assert not is_source_failure(OSError("truncated"))
    assert not any(is_source_failure(OSError(code, "reason")) for code in (errno.EIO, errno.ENOENT, errno.EISDIR))


def test_a_lack_of_descriptors_is_named_with_its_remedy() -> None:
    assert "ulimit -n" in explain_os_error(OSError(errno.EMFILE, "Too many open files"))
    assert explain_os_error(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert explain_os_error(OSError("truncated")) == "truncated"
