"""The assistant as a graph of roles: who looks at a message, in which order, and where the conversation waits for a reply.

        triage -> retrieve -> decide -> answer -> verify        triage nurse, librarian, decider, writer, reviewer
          |   \\                 |  \\-> refuse
          |    decline          clarify -> wait -> triage       interviewer; `wait` is a real interrupt
          escalate

Why an AI engineer draws it as a graph: the order is a promise (nobody looks anything up before the emergency check), and a
graph can be read, tested and resumed. Its state is checkpointed at the end of every turn, so a question back survives a
restart of the service. The roles' own work is in the files named after them; this file only says who comes next.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import Any, TypedDict

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, StateSnapshot, interrupt

from ai_engineer_track.roles import Roles
from ai_engineer_track.trace import recording
from ai_engineer_track.turn import ClarifyQuestion, Event, Turn

log = logging.getLogger(__name__)
NOT_KEPT = "I can't answer right now, because the conversation could not be stored. Please try again in a moment."


class State(TypedDict, total=False):
    """What a checkpoint holds, as plain data. `message` is the newest one; `opening` began the problem it is about.

    `replies` are answers to questions back, in order; `question` the one that waits; `facts` what is remembered of the
    session; `last` the leaflet of the last answer; `reading` what a role notes for the next one; `warning` what stands above this
    turn; `turn` the result.
    """

    message: str
    opening: str
    replies: list[dict[str, str]]
    question: dict[str, Any] | None
    facts: list[dict[str, str]]
    last: str
    reading: dict[str, Any]
    warning: dict[str, Any]
    next: str
    turn: dict[str, Any]


def connect(roles: Roles, checkpointer: BaseCheckpointSaver[Any]) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Who comes after whom."""
    graph = StateGraph(State)
    graph.add_node("triage", roles.triage)  # type: ignore[type-var]
    graph.add_node("escalate", roles.escalate)
    graph.add_node("decline", roles.decline)
    graph.add_node("retrieve", roles.retrieve)
    graph.add_node("decide", roles.decide)
    graph.add_node("clarify", roles.clarify)
    graph.add_node("wait", wait)
    graph.add_node("answer", roles.answer)
    graph.add_node("verify", roles.verify)
    graph.add_node("refuse", roles.refuse)
    graph.add_edge(START, "triage")
    graph.add_conditional_edges("triage", follow, ["escalate", "decline", "retrieve", "refuse"])
    graph.add_edge("retrieve", "decide")
    graph.add_conditional_edges("decide", follow, ["clarify", "answer", "refuse", END])
    graph.add_edge("clarify", "wait")
    graph.add_edge("wait", "triage")  # a reply may be an emergency, too
    graph.add_conditional_edges("answer", follow, ["verify", "refuse", END])
    for last in ("escalate", "decline", "verify", "refuse"):
        graph.add_edge(last, END)
    return graph.compile(checkpointer=checkpointer)


def follow(state: State) -> str:
    """Every role names who comes next."""
    return END if state["next"] == "end" else state["next"]


def wait(state: State) -> State:
    """Stops until the person replies. Nothing may stand before `interrupt`: the node runs anew when it resumes."""
    return replied(state, str(interrupt(state["question"])))


async def run_turn(
    agent: CompiledStateGraph[Any, Any, Any, Any],
    session_id: str,
    message: str,
    on_event: Callable[[Event], None] | None = None,
    begin: State | None = None,
) -> Turn:
    """One message in, one turn out. A message after a question back is its reply; any other begins anew.

    `begin` (of `beginning`) takes the place of what is kept of the session: the turn can so be gone through again. Never raises
    for a fault of the model or the disk: such a turn is `unavailable` and says so.
    """
    config: Any = {"configurable": {"thread_id": session_id}}
    with recording(on_event) as recorder:
        try:
            given: Any = begin
            if given is None:
                pending = await agent.aget_state(config)
                given = Command(resume=message) if waits(pending) else afresh(message)
            state = await agent.ainvoke(given, config, durability="exit")
        except (sqlite3.Error, OSError) as error:
            log.error("session could not be stored: %s", error)
            recorder.text(NOT_KEPT, replace=True)
            # Not the error itself: it names files of this machine, and the turn is shown to the person.
            return Turn(kind="unavailable", text=NOT_KEPT, reason="storage", trace=recorder.steps, cost=recorder.cost)
        if state.get("question"):
            turn = Turn(
                kind="clarify",
                text=state["question"]["text"],
                question=ClarifyQuestion.model_validate(state["question"]),
                **state["reading"]["shown"],
            )
        else:
            turn = Turn.model_validate(state["turn"])
        warning = state.get("warning") or {}
        return turn.model_copy(
            update={
                "trace": recorder.steps,
                "cost": recorder.cost,
                "warning": warning.get("text", ""),
                "sign": turn.sign or warning.get("sign"),
            }
        )


async def beginning(agent: CompiledStateGraph[Any, Any, Any, Any], session_id: str, message: str) -> State:
    """What the turn of this message begins with, as a state that any graph can start from: for a second try, or a shadow."""
    try:
        pending = await agent.aget_state({"configurable": {"thread_id": session_id}})
    except (sqlite3.Error, OSError):  # the turn itself will say so
        return afresh(message)
    state: Any = pending.values
    kept: Any = {key: state[key] for key in ("opening", "facts", "last") if key in state}
    return {**kept, **(replied(state, message) if waits(pending) else afresh(message))}


def waits(pending: StateSnapshot) -> bool:
    """Does the session wait for the reply to a question back?"""
    return bool(pending.interrupts) and pending.next == ("wait",)


def afresh(message: str) -> State:
    return {"message": message, "opening": "", "replies": [], "question": None}


def replied(state: State, reply: str) -> State:
    question = state.get("question") or {}
    replies = [*state.get("replies", []), {"feature": question.get("feature", ""), "text": reply}]
    return {"message": reply, "replies": replies, "question": None}


async def forget(agent: CompiledStateGraph[Any, Any, Any, Any], session_id: str) -> None:
    """Delete all that is remembered of a session: conversation, replies, pending question."""
    await agent.checkpointer.adelete_thread(session_id)  # type: ignore[union-attr]


async def history(agent: CompiledStateGraph[Any, Any, Any, Any], session_id: str) -> dict[str, Any]:
    """What is remembered of a session: facts, and the pending question if there is one."""
    state = (await agent.aget_state({"configurable": {"thread_id": session_id}})).values
    return {"facts": state.get("facts", []), "question": state.get("question"), "last": state.get("last", "")}
