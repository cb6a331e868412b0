"""Conversations belong to the client that began them, survive a restart, and are gone for good when deleted."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest
from fake_assistant import FakeAssistant, Serve
from fastapi.testclient import TestClient
from pydantic import SecretStr

from ai_engineer_track.api.sessions import SessionStore
from shared.errors import UserError


def begin(client: TestClient, message: str = "What helps?") -> str:
    return str(client.post("/chat", json={"message": message}).json()["session_id"])


def test_the_history_holds_every_exchange_in_order(client: TestClient) -> None:
    session_id = begin(client)
    client.post("/chat", json={"message": "And then?", "session_id": session_id})
    history = client.get(f"/sessions/{session_id}").json()
    assert [e["message"] for e in history["exchanges"]] == ["What helps?", "And then?"]
    assert all(e["turn"]["citations"] for e in history["exchanges"])


def test_ids_cannot_be_guessed(client: TestClient) -> None:
    ids = {begin(client) for _ in range(20)}
    assert len(ids) == 20
    assert all(len(set(session_id)) > 8 and len(session_id) == 42 for session_id in ids)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_another_clients_conversation_does_not_exist(serve: Serve, method: str) -> None:
    owner, stranger = serve(), serve()
    session_id = begin(owner)
    begin(stranger)  # has a cookie of its own
    foreign = stranger.request(method, f"/sessions/{session_id}")
    unknown = stranger.request(method, "/sessions/s-unknown")
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json()["error"]["message"] == unknown.json()["error"]["message"]
    assert stranger.post("/chat", json={"message": "What did I say?", "session_id": session_id}).status_code == 404
    assert owner.get(f"/sessions/{session_id}").status_code == 200


def test_a_forged_cookie_is_no_cookie(client: TestClient) -> None:
    session_id = begin(client)
    name, _, signature = str(client.cookies["client"]).rpartition(".")
    for forged in (f"{name}.{signature[:-1]}0", f"{name}.", name, f"someone.{signature}", "." + signature, "é.ü"):
        headers = {"Cookie": b"client=" + forged.encode()}
        fresh = TestClient(client.app)
        assert fresh.get(f"/sessions/{session_id}", headers=headers).status_code == (
            200 if forged == f"{name}.{signature}" else 404
        )


def test_the_cookie_is_kept_from_scripts_and_other_sites(client: TestClient) -> None:
    cookie = client.get("/").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" in TestClient(client.app, base_url="https://testserver").get("/").headers["set-cookie"]
    assert "set-cookie" not in client.get("/").headers


def test_clients_without_cookies_are_known_by_their_token(serve: Serve) -> None:
    auth = {"Authorization": "Bearer s3cret"}
    client = serve(token=SecretStr("s3cret"))
    reply = client.post("/chat", json={"message": "What helps?"}, headers=auth)
    assert "set-cookie" not in reply.headers
    assert client.get(f"/sessions/{reply.json()['session_id']}", headers=auth).status_code == 200
    page = serve(token=SecretStr("s3cret"))
    page.get("/")  # a browser has the cookie of the page and is a client of its own
    assert page.get(f"/sessions/{reply.json()['session_id']}", headers=auth).status_code == 404


def test_a_conversation_survives_a_restart(serve: Serve) -> None:
    before = serve()
    session_id = begin(before)
    after = serve()
    after.cookies.update(before.cookies)
    assert len(after.get(f"/sessions/{session_id}").json()["exchanges"]) == 1


def test_deleting_leaves_nothing_behind(client: TestClient, assistant: FakeAssistant, tmp_path: Path) -> None:
    session_id = begin(client, "a very unusual wording")
    folder = tmp_path / "artifacts" / "service"
    assert any(b"very unusual" in path.read_bytes() for path in folder.iterdir())
    assert client.delete(f"/sessions/{session_id}").status_code == 204
    assert client.get(f"/sessions/{session_id}").status_code == 404
    assert assistant.forgotten == [session_id]
    assert not any(b"very unusual" in path.read_bytes() for path in folder.iterdir())
    assert client.post("/chat", json={"message": "again", "session_id": session_id}).status_code == 404


def test_only_the_owner_may_read_the_file(client: TestClient, tmp_path: Path) -> None:
    begin(client)
    for path in (tmp_path / "artifacts" / "service").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_file_is_set_aside_and_conversations_go_on(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    path.write_bytes(b"this is not a database" * 100)
    store = SessionStore(path)
    assert store.belongs(store.begin("somebody"), "somebody")
    store.close()
    (aside,) = tmp_path.glob("sessions.sqlite.damaged-*")
    assert aside.read_bytes().startswith(b"this is not a database")


def test_damage_under_a_running_service_is_mended_and_cookies_stay_valid(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    store = SessionStore(path)
    kept, secret = store.begin("somebody"), store.secret
    store.delete(kept)  # empties the write-ahead log: everything is in the file now
    path.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096))
    for companion in ("-wal", "-shm"):
        path.with_name(path.name + companion).unlink(missing_ok=True)
    store._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)  # what a page cache no longer holds
    assert store.belongs(store.begin("somebody"), "somebody")
    assert store.secret == secret
    assert SessionStore(path).secret == secret


def test_a_place_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="conversations cannot be stored"):
        SessionStore(tmp_path / "file" / "sessions.sqlite")
