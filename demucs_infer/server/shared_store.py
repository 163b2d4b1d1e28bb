"""Keep the jobs of several servers in one Redis, and lease each to the server that works on it.

A lease is on the result, not on the job: two jobs for the same result never run at the same time,
and a job that does not run finds the result of the one that did. A server that stops renewing its
leases, because it is dead or cut off, loses them; what it still writes about its jobs is refused.

Redis is used because one script in it is one transaction for all servers. SQLite in a shared folder
is not: the locks of network file systems are not reliable.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Protocol
from urllib.parse import urlsplit

from demucs_infer.errors import ConfigError
from demucs_infer.server.errors import ApiError
from demucs_infer.server.sharing import KEY_BYTES
from demucs_infer.server.store import JobRecord, dump_record, parse_record

logger = logging.getLogger(__name__)

_PREFIX = "{demucs}:"
"""Of all keys; the braces keep them on one node of a Redis Cluster, as the scripts require."""

_TIMEOUT_SECONDS = 2.0
_PAUSE_SECONDS = 2.0
"""How long Redis is not asked again after it did not answer, as every call blocks the server."""

_SLOT_SECONDS = 30.0
"""How long a place in the queue outlives the server that reserved it."""

_PUT = """
local job, unfinished, finished, owner, slots, lease = unpack(KEYS)
local id, record, status, created, ended, slot, has_owner, token = unpack(ARGV)
if token ~= '' and redis.call('get', lease) ~= token then return 0 end
redis.call('hset', job, 'record', record, 'status', status)
if ended == '' then
  redis.call('zadd', unfinished, created, id)
  if slot ~= '' then redis.call('zadd', slots, '+inf', slot) end
else
  redis.call('zrem', unfinished, id)
  redis.call('zadd', finished, ended, id)
  redis.call('zrem', slots, slot)
end
if has_owner == '1' then redis.call('zadd', owner, created, id) end
return 1
"""
_CLAIM = """
local prefix, server, milliseconds, before = unpack(ARGV, 1, 4)
local busy = {}
for i = 5, #ARGV do busy[ARGV[i]] = true end
for _, id in ipairs(redis.call('zrangebyscore', KEYS[1], '-inf', before)) do
  local record = redis.call('hget', prefix .. 'job:' .. id, 'record')
  local ok, values = pcall(cjson.decode, record or '')
  if not ok or type(values) ~= 'table' or type(values.entry) ~= 'string' then
    redis.call('zrem', KEYS[1], id)
  elseif not busy[values.owner]
      and redis.call('set', prefix .. 'lease:' .. values.entry, server .. '/' .. id,
                     'NX', 'PX', milliseconds) then
    return {record, redis.call('hexists', prefix .. 'job:' .. id, 'cancel'),
            redis.call('lrange', prefix .. 'events:' .. id, 0, -1)}
  end
end
return false
"""
_RENEW = """
local prefix, server, milliseconds = ARGV[1], ARGV[2], ARGV[3]
local answers = {}
for i = 4, #ARGV, 2 do
  local lease, token = prefix .. 'lease:' .. ARGV[i], server .. '/' .. ARGV[i + 1]
  local holder = redis.call('get', lease)
  if holder and holder ~= token then
    table.insert(answers, -1)
  else
    -- One that has expired is taken again, but not one that was released meanwhile.
    if holder or redis.call('zscore', KEYS[1], ARGV[i + 1]) then
      redis.call('set', lease, token, 'PX', milliseconds)
    end
    table.insert(answers, redis.call('hexists', prefix .. 'job:' .. ARGV[i + 1], 'cancel'))
  end
end
return answers
"""
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end"
_PUBLISH = """
local token, state = ARGV[1], ARGV[2]
if redis.call('get', KEYS[1]) ~= token then return 0 end
redis.call('hset', KEYS[2], 'state', state)
for i = 3, #ARGV do redis.call('rpush', KEYS[3], ARGV[i]) end
return 1
"""
_RESERVE = """
local client, slot, seconds, max_total, max_client = unpack(ARGV)
local now = tonumber(redis.call('time')[1])
redis.call('zremrangebyscore', KEYS[1], '-inf', now)
local mine = 0
for _, other in ipairs(redis.call('zrange', KEYS[1], 0, -1)) do
  if string.sub(other, 34) == client then mine = mine + 1 end
end
local total = redis.call('zcard', KEYS[1])
if slot ~= '' and total < tonumber(max_total)
    and (tonumber(max_client) == 0 or mine < tonumber(max_client)) then
  redis.call('zadd', KEYS[1], now + tonumber(seconds), slot)
  return {total, mine, 1}
end
return {total, mine, 0}
"""
_EXTEND = """
local expiry = tonumber(redis.call('time')[1]) + tonumber(ARGV[1])
for i = 2, #ARGV do
  local score = redis.call('zscore', KEYS[1], ARGV[i])
  if score and score ~= 'inf' then redis.call('zadd', KEYS[1], expiry, ARGV[i]) end
end
"""


class _Reply(Protocol):
    """A script of Redis."""

    def __call__(self, *, keys: list[str], args: list[Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """An unfinished job that this server has to work on now."""

    record: JobRecord
    is_cancelled: bool
    events: list[dict[str, Any]]
    """What servers before this one have published."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the other servers know about a job."""

    record: JobRecord
    state: dict[str, Any]
    """What its server has published last."""

    events: list[dict[str, Any]]
    """The events after the number that was requested."""

    position: int | None
    """How many unfinished jobs are older."""


class SharedStore:
    """Job records, leases, events and places in the queue of all servers."""

    def __init__(self, url: str, lease_seconds: float, server: str = "") -> None:
        """Connect; raise `ConfigError` if that is impossible."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigError("redis_url needs the redis package: pip install redis") from error
        self.server = server or token_hex(8)
        self.lease_seconds = lease_seconds
        self.held: dict[str, str] = {}
        """The leases of this server: the job by the name of its result."""

        self._failure: type[Exception] = redis.RedisError
        self._paused_until = 0.0
        try:
            self._redis: Any = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=_TIMEOUT_SECONDS,
                socket_connect_timeout=_TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 1),  # for a connection that was closed while idle
            )
            self._redis.ping()
        except (redis.RedisError, ValueError) as error:
            host = urlsplit(url).hostname  # the address may contain a password
            raise ConfigError(f"redis_url: no Redis at {host!r}: {error}") from error
        script: Callable[[str], _Reply] = self._redis.register_script
        self._put, self._claim, self._renew = script(_PUT), script(_CLAIM), script(_RENEW)
        self._release, self._publish = script(_RELEASE), script(_PUBLISH)
        self._reserve, self._extend = script(_RESERVE), script(_EXTEND)

    # ── records: the methods of JobStore ──

    def put(self, record: JobRecord, entry: str = "") -> bool:
        """Insert or replace a record; return False if that fails, or another server has the job.

        `entry` is the result that this server has leased for the job, if it is not the record's.
        """
        entry = entry or record.entry
        keys = [_key("job", record.id), _key("unfinished"), _key("finished")]
        keys += [_key("owner", record.owner), _key("slots"), _key("lease", entry)]
        ended = "" if record.finished is None else record.finished
        values = [record.id, dump_record(record), record.status, record.created, ended]
        values += [
            record.slot,
            int(bool(record.owner)),
            self._token(record.id) if self.held.get(entry) == record.id else "",
        ]
        try:
            with self._connect():
                is_saved = bool(self._put(keys=keys, args=values))
        except ApiError:
            return False
        if not is_saved:
            logger.error("job %s was taken over by another server", record.id)
            self.held.pop(entry, None)
        return is_saved

    def put_error(self) -> ApiError:
        """Return the error for a record that could not be saved."""
        return _unreachable()

    def get(self, id: str) -> JobRecord | None:
        """Return the record with this id; raise `ApiError` if Redis cannot be reached."""
        with self._connect():
            return next(iter(self._parse([self._redis.hget(_key("job", id), "record")])), None)

    def list_unfinished(self) -> list[JobRecord]:
        """Return every job that has not finished, the oldest first."""
        with self._connect():
            return self._load(self._redis.zrange(_key("unfinished"), 0, -1))

    def list_finished(self) -> list[JobRecord]:
        """Return every finished job."""
        with self._connect():
            return self._load(self._redis.zrange(_key("finished"), 0, -1))

    def list_finished_ids(self) -> list[str]:
        """Return the id of every job that is done."""
        return [record.id for record in self.list_finished() if record.status == "done"]

    def list_by_owner(self, owner: str, limit: int) -> list[JobRecord]:
        """Return the jobs of a client, the newest first."""
        with self._connect():
            return self._load(self._redis.zrevrange(_key("owner", owner), 0, limit - 1))

    def remove(self, id: str) -> None:
        """Delete a record with its events; without Redis it stays until the next clean-up."""
        try:
            record = self.get(id)
            with self._connect(), self._redis.pipeline() as pipeline:
                pipeline.delete(_key("job", id), _key("events", id))
                pipeline.zrem(_key("unfinished"), id)
                pipeline.zrem(_key("finished"), id)
                if record is not None:
                    pipeline.zrem(_key("slots"), record.slot)
                    pipeline.zrem(_key("owner", record.owner), id)
                pipeline.execute()
        except ApiError:
            logger.error("job %s cannot be deleted now", id)

    def agree_on_key(self) -> bytes:
        """Return the secret key of links, which the first server that asks has made."""
        name = _key("links-key")
        with self._connect():
            self._redis.set(name, token_hex(KEY_BYTES), nx=True)
            return bytes.fromhex(self._redis.get(name))

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    # ── leases ──

    def claim(self, before: float = math.inf, busy: Collection[str] = ()) -> Claim | None:
        """Lease the oldest job, created before `before`, that no server works on; None without.

        Jobs of the owners in `busy` are left to others.
        """
        limit = "+inf" if before == math.inf else f"({before!r}"
        with self._connect():
            reply = self._claim(
                keys=[_key("unfinished")],
                args=[_PREFIX, self.server, self._milliseconds, limit, *busy],
            )
        if not reply:
            return None
        text, is_cancelled, events = reply
        records = self._parse([text])
        if not records:
            return None
        self.held[records[0].entry] = records[0].id
        return Claim(records[0], bool(is_cancelled), [json.loads(event) for event in events])

    def lease(self, entry: str, id: str) -> bool:
        """Lease a result for the job `id`; return False if another job has the lease."""
        with self._connect():
            is_free = self._redis.set(
                _key("lease", entry), self._token(id), nx=True, px=self._milliseconds
            )
        if is_free:
            self.held[entry] = id
        return bool(is_free)

    def holds(self, record: JobRecord) -> bool:
        """Return whether this server has the lease of a job, as far as it knows."""
        return self.held.get(record.entry) == record.id

    def release(self, entry: str, id: str) -> None:
        """Give a lease back, if this server has it; otherwise it expires."""
        if self.held.get(entry) != id:
            return
        del self.held[entry]
        try:
            with self._connect():
                self._release(keys=[_key("lease", entry)], args=[self._token(id)])
        except ApiError:
            logger.warning("the lease of job %s ends in %g s", id, self.lease_seconds)

    def renew(self, slots: Collection[str]) -> tuple[set[str], set[str]]:
        """Renew all leases and the given slots; return the jobs lost, and those to be cancelled."""
        leases = list(self.held.items())
        values = [text for lease in leases for text in lease]
        with self._connect():
            answers = self._renew(
                keys=[_key("unfinished")],
                args=[_PREFIX, self.server, self._milliseconds, *values],
            )
            if slots:
                self._extend(keys=[_key("slots")], args=[_SLOT_SECONDS, *slots])
        lost, cancelled = set(), set()
        for (entry, id), answer in zip(leases, answers):
            if self.held.get(entry) != id:  # released meanwhile
                continue
            if answer < 0:
                lost.add(id)
                del self.held[entry]
            elif answer > 0:
                cancelled.add(id)
        return lost, cancelled

    def list_leased_entries(self) -> set[str]:
        """Return the names of all results that servers work on."""
        start = _key("lease", "")
        with self._connect():
            keys = list(self._redis.scan_iter(match=f"{start}*", count=1000))
        return {key[len(start) :] for key in keys}

    def request_cancel(self, id: str) -> None:
        """Tell the server that works on a job, now or later, to cancel it."""
        with self._connect():
            self._redis.hset(_key("job", id), "cancel", 1)

    def begin_clean_up(self, seconds: float) -> bool:
        """Return whether this server is the one to clean up in the next `seconds`."""
        with self._connect():
            milliseconds = max(round(seconds * 1000), 1)
            return bool(self._redis.set(_key("clean-up"), self.server, nx=True, px=milliseconds))

    # ── progress ──

    def publish(
        self, record: JobRecord, state: dict[str, Any], events: list[dict[str, Any]]
    ) -> None:
        """Publish the state and new events of a job of this server."""
        keys = [_key("lease", record.entry), _key("job", record.id), _key("events", record.id)]
        values = [self._token(record.id), json.dumps(state), *map(json.dumps, events)]
        with self._connect():
            self._publish(keys=keys, args=values)

    def read(self, ids: Collection[str], after: Collection[int]) -> list[Snapshot | None]:
        """Return what is known about each job, with its events after a number."""
        with self._connect(), self._redis.pipeline(transaction=False) as pipeline:
            for id, number in zip(ids, after):
                pipeline.hmget(_key("job", id), "record", "state")
                pipeline.lrange(_key("events", id), number, -1)
                pipeline.zrank(_key("unfinished"), id)
            replies = pipeline.execute()
        snapshots: list[Snapshot | None] = []
        for (text, state), events, rank in zip(*[iter(replies)] * 3):
            records = self._parse([text])
            if not records:
                snapshots.append(None)
                continue
            loaded = [json.loads(event) for event in events]
            snapshots.append(Snapshot(records[0], json.loads(state or "{}"), loaded, rank))
        return snapshots

    def count_waiting(self) -> int:
        """Return the number of jobs of all servers that wait."""
        return sum(record.status == "queued" for record in self.list_unfinished())

    # ── limits over all servers: the methods of SlotCounter ──

    def count(self, client: str) -> tuple[int, int]:
        """Return the number of places taken, in total and by a client."""
        total, by_client, _ = self._add(client, "", 0, 0)
        return total, by_client

    def add(self, client: str, max_total: float, max_per_client: int) -> str | None:
        """Take a place and return its name, or None above a limit (`max_per_client` 0: none)."""
        slot = f"{token_hex(16)}\t{client}"
        *_, is_taken = self._add(client, slot, max_total, max_per_client)
        return slot if is_taken else None

    def remove_slot(self, slot: str) -> None:
        """Free a place."""
        try:
            with self._connect():
                self._redis.zrem(_key("slots"), slot)
        except ApiError:
            logger.warning("a place in the queue is free in %g s only", _SLOT_SECONDS)

    def _add(
        self, client: str, slot: str, max_total: float, max_per_client: int
    ) -> tuple[int, int, bool]:
        values = [client, slot, _SLOT_SECONDS, max_total, max_per_client]
        with self._connect():
            total, by_client, is_taken = self._reserve(keys=[_key("slots")], args=values)
        return int(total), int(by_client), bool(is_taken)

    # ── details ──

    @property
    def _milliseconds(self) -> int:
        return round(self.lease_seconds * 1000)

    def _token(self, id: str) -> str:
        return f"{self.server}/{id}"

    @contextmanager
    def _connect(self) -> Iterator[None]:
        """Turn failures of Redis into `ApiError`, and pause after each."""
        if time.monotonic() < self._paused_until:
            raise _unreachable()
        try:
            yield
        except self._failure as error:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            logger.error("Redis failed: %s", error)
            raise _unreachable() from error

    def _load(self, ids: list[str]) -> list[JobRecord]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for id in ids:
                pipeline.hget(_key("job", id), "record")
            return self._parse(pipeline.execute())

    def _parse(self, texts: list[str | None]) -> list[JobRecord]:
        """Return the records that are complete; the others are as if they did not exist."""
        records = []
        for text in texts:
            try:
                if text is not None:
                    records.append(parse_record(text))
            except (ValueError, TypeError, KeyError) as error:
                logger.error("the record of a job is damaged: %s", error)
        return records


def _key(*names: str) -> str:
    return _PREFIX + ":".join(names)


def _unreachable() -> ApiError:
    return ApiError("busy", "the shared job store cannot be reached: try again later", 5)
