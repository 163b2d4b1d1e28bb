"""Places for uploads and in the queue, and the memory for bodies."""

import anyio
import pytest

from demucs_infer.server.admission import Admission, MemoryBudget
from demucs_infer.server.errors import ApiError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_admission(**changes: float) -> Admission:
    values = {"max_queue": 2, "max_per_client": 0, "min_upload_rate": 1000} | changes
    return Admission(max_upload_seconds=60, estimate_wait=lambda: 1, **values)  # type: ignore[arg-type]


async def test_uploads_that_do_not_arrive_take_no_place() -> None:
    admission = make_admission()
    with admission.begin_upload("a"), admission.begin_upload("b"), admission.begin_upload("c") as c:
        c.receive(10_000)
        assert admission.reserve(c).is_held


async def test_uploads_that_arrive_take_places() -> None:
    admission = make_admission()
    with admission.begin_upload("a") as first, admission.begin_upload("b") as second:
        first.receive(1000)
        second.receive(1000)
        with pytest.raises(ApiError, match="queue is full"), admission.begin_upload("c"):
            pass


async def test_longest_stalled_upload_gives_way() -> None:
    admission = make_admission(max_queue=1)
    with admission.begin_upload("a") as first, admission.begin_upload("b") as second:
        with admission.begin_upload("c"):
            assert first.has_given_way and not second.has_given_way
        with pytest.raises(ApiError, match="its place was needed"), first.limit_time():
            await anyio.sleep(5)


async def test_full_queue_refuses_body_that_has_arrived() -> None:
    admission = make_admission(max_queue=1)
    with admission.begin_upload("a") as first, admission.begin_upload("b") as second:
        slot = admission.reserve(first)
        with pytest.raises(ApiError, match="queue is full"):
            admission.reserve(second)
        slot.release()
        slot.release()
    with admission.begin_upload("c") as third:
        assert admission.reserve(third).is_held


async def test_memory_is_bounded_and_given_in_order() -> None:
    budget, order = MemoryBudget(100), []

    async def use(number: int, size: int) -> None:
        async with budget.hold(size, 5):
            order.append(number)
            assert budget._held <= 100
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        for number, size in enumerate((60, 60, 1000, 10)):
            group.start_soon(use, number, size)
            await anyio.sleep(0)
    assert order == [0, 1, 2, 3] and budget._held == 0


async def test_wait_for_memory_is_limited() -> None:
    budget = MemoryBudget(10)
    async with budget.hold(10, 1):
        with pytest.raises(ApiError, match="large bodies"):
            async with budget.hold(1, 0.01):
                pass
    async with budget.hold(10, 1):
        pass
