"""The page of a desk, wired: which handler runs on which event, one after the other."""

import functools
from typing import Any

import gradio as gr
from gradio.events import api

from sparsewsi.web.api import Api
from sparsewsi.web.desk import Desk
from sparsewsi.web.errors import say_once, tell_beside
from sparsewsi.web.handlers import Handlers
from sparsewsi.web.layout import Page, lay_out

WORK: dict[str, Any] = {"concurrency_id": "work", "concurrency_limit": None}  # whose turn it is: jobs.py
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {"show_progress": "hidden", **PRIVATE}
SHOWN_BEFORE = "() => [document.querySelector('#room')?.dataset.left || '']"  # viewer/address.js says it
EVERY: dict[str, Any] = {"trigger_mode": "multiple"}  # also while the same event is still busy with another slide


def build_page(desk: Desk) -> gr.Blocks:
    """The page of a desk and its API, ready to be launched."""
    demo, page = lay_out(desk)
    handlers, functions = Handlers(desk, page), Api(desk)
    with demo:
        analysed = _wire_slides(demo, page, handlers, desk.allow_paths)
        _wire_questions(page, handlers, analysed)
        _wire_what_if(page, handlers)
        for function in (functions.analyze, functions.ask, functions.evidence):
            api(function, api_name=function.__name__, **WORK)
    return demo.queue(default_concurrency_limit=None, api_open=False)


def _wire_slides(demo: gr.Blocks, page: Page, on: Handlers, allow_paths: bool) -> list:
    """Returns the events of which one ends when a slide has been analysed."""
    waiting = {"show_progress_on": page.facts, **PRIVATE}
    tell = functools.partial(tell_beside, page.wrong)
    chosen, asked = [page.asked, page.mpp, page.wrong], [page.asked, page.wrong]
    boxes = [page.question, page.given_options, page.impression]
    loaded = [page.asked, page.left, page.lost, page.reopen, *boxes]
    opened = [
        page.gallery.choose(tell(on.on_choose), page.beside, chosen, **waiting, **EVERY),
        page.upload.upload(tell(on.on_upload), [page.upload, page.beside], asked, **waiting, **EVERY),
        demo.load(on.on_load, page.token, loaded, js=SHOWN_BEFORE, **QUIET),
        page.reopen.click(tell(on.on_reopen), page.left, asked, **waiting),
        page.back.click(tell(on.on_reopen), page.left, asked, **waiting),
    ]
    if allow_paths:
        typed = [page.typed_path, page.beside]
        opened.append(page.typed_path.submit(tell(on.on_typed_path), typed, asked, **waiting, **EVERY))
    talk = [page.chat, page.questions, page.answers, page.compare, page.picks, page.picked, page.aside, page.earlier]
    cleared = [page.coming, page.view, page.opened, *talk, page.secret, page.waiting, page.facts, page.question]
    cleared += [page.called, page.mpp, page.doubts, page.typed_path, page.beside, page.k, page.selector]
    cleared += [page.lost, page.reopen, page.wrong, page.next_line, page.given_options, page.impression]
    cleared += [page.left, page.back]
    filled = [page.opened, page.view, page.facts, page.secret, page.planted, page.examples, page.starters, page.mpp]
    filled += [page.k, page.alone, page.coming, *talk]
    told = [page.opened, page.aside, page.coming]
    analysed = [page.view.remove(on.on_remove, [*told, page.chat], filled, **QUIET, **WORK)]
    for trigger in [*[event.success for event in opened], page.mpp.submit]:
        shown = trigger(tell(on.on_slide), [page.asked, page.mpp, *told], cleared, **QUIET, **EVERY)
        shown.success(on.on_left, None, [page.right, page.other, page.view], **QUIET, **EVERY)
        seen = [page.coming, page.opened, page.chat]
        analysed.append(shown.success(say_once(on.on_slide_shown), seen, filled, **QUIET, **WORK, **EVERY))
    named = [page.called, page.opened, page.aside]
    for told_of in (page.called.blur, page.called.submit):
        told_of(on.on_called, named, None, **QUIET, **EVERY)
    for event in analysed:
        offered = event.success(on.on_analysed, [page.opened, page.answers], None, **QUIET, **EVERY)
        back = [page.chat, page.questions, page.answers, page.called, page.earlier, page.view, *boxes]
        named_again = offered.success(on.on_back, [page.asked, page.opened, page.chat], back, **QUIET, **EVERY)
        for one in (event, named_again):
            one.success(on.on_called, named, None, **QUIET, **EVERY)
        event.success(on.on_case, page.opened, [page.doubts, page.view], **QUIET, **EVERY)
        event.success(on.on_map_wanted, page.opened, page.view, **QUIET, **EVERY)
    analysed[0].success(on.on_left, None, [page.right, page.other, page.view], **QUIET)
    page.view.shown(on.on_shown, None, page.number, **QUIET)
    page.view.cancel(on.on_cancel, None, None, queue=False, **QUIET)  # never behind others
    demo.unload(on.on_unload)
    return analysed


def _wire_questions(page: Page, on: Handlers, analysed: list) -> None:
    ended = [page.opened, page.chat, page.answers]
    said = [page.opened, page.aside, page.chat, page.questions, page.answers]
    talk = [page.chat, page.questions, page.question]
    typed = [page.question, page.given_options, page.impression, page.opened, page.coming, page.chat, page.questions]
    starter = [page.examples, page.starters, page.opened, page.coming, page.chat, page.questions, page.impression]
    suggested = [page.opened, page.chat, page.questions, page.impression]
    boxes = [page.given_options, page.waiting, page.impression, page.next_line]
    kept = [page.given_options, page.impression]  # of a question that is refused
    asked_too = [page.opened, page.right, page.chat, page.questions, page.answers]
    after = [page.question, page.next, page.next_line]
    ready = [page.opened, page.waiting, page.coming, page.chat]
    asked = [
        page.question.submit(on.on_question, typed, [*talk, *boxes], **QUIET),
        page.examples.click(on.on_starter, starter, [*talk, *boxes], **QUIET),
        page.view.ask(on.on_suggested, suggested, [*talk, page.impression, page.next_line], **QUIET),
        page.next.change(
            on.on_next,
            [page.next, page.opened, page.chat, page.questions],
            [*talk, *kept, page.next, page.next_line],
            **QUIET,
            **EVERY,
        ),
        page.chat.retry(on.on_retry, [page.opened, page.chat], talk, **QUIET),
        page.chat.edit(on.on_edit, [page.opened, page.chat, page.questions], [*talk, *kept], **QUIET),
        *(one.success(on.on_ready, ready, [*talk, *boxes], **QUIET) for one in analysed),
    ]
    for event in asked:
        event.success(on.on_answer_shown, ended, page.view, **QUIET)
        answered = event.success(
            say_once(on.on_asked),
            [page.opened, page.chat, page.questions, page.answers],
            [page.chat, page.questions, page.answers, page.view, page.question],
            **QUIET,
            **WORK,
            **EVERY,
        )
        both = answered.success(
            say_once(on.on_asked_too),
            asked_too,
            [page.chat, page.right, page.other, page.question],
            **QUIET,
            **WORK,
            **EVERY,
        )
        for ended_by in (answered.failure, both.then):  # a comparison has another answer to come
            ended_by(on.on_answered, None, after, **QUIET, **EVERY)
        for one in (answered, both):
            one.then(on.on_talked, said, None, **QUIET, **EVERY)
    back = [page.question, page.given_options, page.impression, page.next_line]
    page.question.stop(on.on_stop, page.chat, [page.chat, *back], queue=False, **QUIET)  # never behind others
    taken_back = [
        page.chat.undo(
            on.on_undo,
            [page.chat, page.questions, page.answers],
            [*talk, page.answers, page.given_options],
            **QUIET,
        ),
        page.chat.clear(on.on_clear, None, [page.questions, page.answers, page.waiting, *back], **QUIET),
    ]
    for event in taken_back:
        event.success(on.on_analysed, [page.opened, page.answers], None, **QUIET)
        event.success(on.on_answer_shown, ended, page.view, **QUIET)
        event.success(on.on_talked, said, None, **QUIET)


def _wire_what_if(page: Page, on: Handlers) -> None:
    page.view.picks(on.on_picks, [page.opened, page.picks], [page.picks, page.picked, page.view], **QUIET, **EVERY)
    page.unpick.click(on.on_unpick, None, [page.picks, page.picked, page.view], **QUIET)
    page.view.marks(on.on_marks, page.opened, None, **QUIET, **EVERY)
    page.view.likes(on.on_likes, page.opened, page.view, **QUIET)
    page.view.journal(on.on_journal, None, None, **QUIET)
    told = [page.opened, page.chat, page.questions, page.answers, page.aside]
    seen = [*told, page.compare, page.view, page.question, page.facts]
    two = [*told, page.right, page.view, page.other, page.question, page.given_options]
    apart = page.view.compare(on.on_two, told, two, **QUIET, **WORK)
    apart.success(on.on_analysed, [page.opened, page.answers], None, **QUIET)
    apart.success(on.on_map_wanted, page.opened, page.view, **QUIET)
    chosen = [*told, page.k, page.selector, page.picks]
    again = page.again.click(on.on_ask_again, chosen, seen, show_progress_on=page.compare, **PRIVATE, **WORK)
    less = page.view.without(on.on_without, told, seen, **QUIET, **WORK)
    both = page.both.click(on.on_both, chosen, [*told, page.right, page.other, page.view], **QUIET, **WORK)
    too = [page.opened, page.right, page.chat, page.questions, page.answers]
    for event in (again, less, both):
        asked = event.success(
            say_once(on.on_asked_too), too, [page.chat, page.right, page.other, page.question], **QUIET, **WORK, **EVERY
        )
        for ended_by in (event.failure, asked.then):
            ended_by(on.on_answered, None, [page.question, page.next, page.next_line], **QUIET, **EVERY)
    boxes = [page.given_options, page.impression, page.next_line]
    restored = [*seen, *boxes, page.picks, page.picked, page.k, page.selector]
    for leave in (page.own.click, page.view.leave, page.other.leave):
        left = leave(on.on_leave, [page.opened, page.chat, page.answers, page.aside], restored, **QUIET)
        left.success(on.on_left, None, [page.right, page.other, page.view], **QUIET)
    page.regions.upload(on.on_regions, [page.regions, page.opened, page.number], page.view, **QUIET)
