"""What went wrong, as one sentence on the page or for the caller of the API."""

import functools
import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from sparsewsi.web.jobs import Halted


@contextmanager
def explain_errors() -> Iterator[None]:
    """Raise gr.Error with one sentence for input at fault, and for a defect of ours; for Halted one nobody sees."""
    try:
        yield
    except Halted:
        raise stop_unseen() from None
    except gr.Error:  # a ValueError
        raise
    except (ValueError, OSError, RuntimeError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = " ".join(text.split()).replace("Pass slide_mpp=", 'Fill in "Scan µm/px" (under Open) and press Enter')
        text = text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text  # a file's name stays as it is
        raise gr.Error(text, duration=30, print_exception=False) from error
    except Exception as error:  # a defect: the server's log has the rest
        raise gr.Error("That failed, and the program is at fault; try again.", duration=30) from error


@contextmanager
def say_which(which: str) -> Iterator[None]:
    """A ValueError says which of several slides it is about, where there are several."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        if not which:
            raise
        raise ValueError(f"{which}: {error}") from error


def tell_beside(part: gr.HTML, handler: Callable[..., dict[Any, Any]]) -> Callable[..., Iterator[dict[Any, Any]]]:
    """The handler with its errors told in a part of the page, where what it was given was typed, and in no toast."""

    @functools.wraps(handler)
    def handle(*given: Any, **named: Any) -> Iterator[dict[Any, Any]]:
        yield {part: ""}
        try:
            changes = handler(*given, **named)
        except gr.Error as error:
            if not error.message or not error.visible:
                raise
            yield {part: f"<p role='alert'>{html.escape(error.message)}</p>"}
            raise gr.Error(error.message, visible=False, print_exception=False) from error
        yield changes

    return handle


def say_once(handler: Callable[..., Iterator[dict[Any, Any]]]) -> Callable[..., Iterator[dict[Any, Any]]]:
    """The handler with nothing as its last word: Gradio sends what a generator yielded last once more when it ends,
    over what the reader has begun meanwhile, such as the edit of a question."""

    @functools.wraps(handler)
    def handle(*given: Any, **named: Any) -> Iterator[dict[Any, Any]]:
        yield from handler(*given, **named)  # which closes it, too
        yield gr.skip()

    return handle


def refuse(sentence: str) -> gr.Error:
    """An error for the reader alone: the server's log does not need it."""
    return gr.Error(sentence, print_exception=False)


def stop_unseen() -> gr.Error:
    """An error that nobody sees: the steps that would follow are not run."""
    return gr.Error("", visible=False, print_exception=False)
