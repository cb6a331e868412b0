"""GET /search and /leaflets: the library itself, as the assistant sees it.

`/leaflets/{slug}` gives every sentence its id, so that a citation can open the very sentence it quotes.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from ai_engineer_track.api.service import Index, ServiceDep
from ai_engineer_track.api.sessions import address_of
from ai_engineer_track.turn import FoundPassage

router = APIRouter(tags=["library"])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sentence(_Strict):
    id: str
    text: str


class Section(_Strict):
    section: str
    heading: str
    sentences: list[Sentence]


class LeafletName(_Strict):
    slug: str
    title: str


class Leaflet(LeafletName):
    sections: list[Section]


class Found(FoundPassage):
    """A passage with its sentences, for people who search without asking."""

    document: str
    sentences: list[Sentence]


class Results(_Strict):
    query: str
    index_version: str
    results: list[Found]


class Leaflets(_Strict):
    index_version: str
    leaflets: list[LeafletName]


@router.get("/search")
async def search(
    request: Request,
    service: ServiceDep,
    q: Annotated[str, Query(min_length=1, description="what to look for")],
    k: Annotated[int, Query(ge=1, le=50, description="how many passages")] = 5,
) -> Results:
    """The passages that fit best, best first."""
    retriever, index = service.need_retriever(), service.need_index()
    service.rate.take(address_of(request))
    query = q.strip()
    if not query or len(query) > service.settings.api.max_chars:
        raise HTTPException(422, f"Search for between 1 and {service.settings.api.max_chars:,} characters.")
    hits = await run_in_threadpool(retriever.search, query, k)
    return Results(query=query, index_version=index.version, results=[_found(hit) for hit in hits])


@router.get("/leaflets")
async def leaflets(service: ServiceDep) -> Leaflets:
    """Every document of the library, by title."""
    index = service.need_index()
    titles = {passage.document: passage.title for passage in index.passages.values()}
    names = [LeafletName(slug=slug, title=title) for slug, title in titles.items()]
    return Leaflets(index_version=index.version, leaflets=sorted(names, key=lambda name: name.title.casefold()))


@router.get("/leaflets/{slug}")
async def leaflet(slug: str, service: ServiceDep) -> Leaflet:
    """One document: its sections in reading order, every sentence once, with its id."""
    return _leaflet(service.need_index(), slug)


def _leaflet(index: Index, slug: str) -> Leaflet:
    passages = [passage for passage in index.passages.values() if passage.document == slug]
    if not passages:
        raise HTTPException(404, "There is no such leaflet.")
    sections: list[Section] = []
    seen: set[str] = set()  # passages of a long document may overlap
    for passage in passages:
        sentences = [Sentence(id=s.id, text=s.text) for s in passage.sentences if s.id not in seen]
        seen.update(sentence.id for sentence in sentences)
        if sections and sections[-1].section == passage.section:
            sections[-1].sentences += sentences
        else:
            heading = passage.heading.removeprefix(f"{passage.title}: ")
            sections.append(Section(section=passage.section, heading=heading, sentences=sentences))
    return Leaflet(slug=slug, title=passages[0].title, sections=sections)


def _found(hit: Any) -> Found:
    passage = hit.passage
    return Found(
        id=passage.id,
        document=passage.document,
        title=passage.title,
        section=passage.section,
        score=hit.score,
        dense_rank=hit.dense_rank,
        bm25_rank=hit.bm25_rank,
        sentences=[Sentence(id=s.id, text=s.text) for s in passage.sentences],
    )
