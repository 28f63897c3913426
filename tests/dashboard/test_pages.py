"""The dashboard in a real browser: what people do with it, from the first look on."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.dashboard.conftest import WAIT_MS, NewPage
from tests.harness import PROJECT, Server, curl

pytestmark = pytest.mark.asyncio(loop_scope="module")

expect.set_options(timeout=WAIT_MS)

PRINTS = "for i in $(seq 1 6000); do echo line $i of stdout; echo oops $i >&2; sleep 0.2; done"


async def download_of(page: Page, button: str) -> bytes:
    """Press a button and return what it has saved."""
    async with page.expect_download() as waiting:
        await page.get_by_role("button", name=re.compile(button)).click()
    path = await (await waiting.value).path()
    return path.read_bytes()


async def log_lines(page: Page) -> list[str]:
    """Return the lines of the log that stand in the page."""
    return await page.locator(".line .line-text").all_inner_texts()


async def drop(page: Page, files: dict[str, str]) -> None:
    """Drop files on the page as a file manager does."""
    transfer = await page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, text] of Object.entries(files))
                transfer.items.add(new File([text], name));
            return transfer;
        }""",
        files,
    )
    for event in ("dragenter", "dragover", "drop"):
        await page.locator(".submit").dispatch_event(event, {"dataTransfer": transfer})


async def test_a_stranger_submits_the_example_and_has_its_result(
    site: Server, new_page: NewPage
) -> None:
    page = await new_page(f"{site.url}/")
    await page.wait_for_url(f"{site.url}/ui/")
    await expect(page).to_have_title("Overview · Orchestrator")
    await page.get_by_role("button", name="Try the example").click()
    await expect(page.get_by_text("2oob_A.pdb", exact=True)).to_be_visible()
    await page.get_by_role("button", name="Submit", exact=True).click()
    await page.wait_for_url("**/#/jobs/1")
    await expect(page.locator(".job-state .state")).to_have_text("Completed")
    await expect(page.locator(".log-lines")).to_contain_text("2oob_A")
    archive = zipfile.ZipFile(io.BytesIO(await download_of(page, "Download result")))
    assert {"run.sh", "analyse.awk", "table.txt", "stdout.log"} <= set(archive.namelist())
    await page.get_by_role("link", name="Files").click()
    await page.get_by_role("link", name=re.compile("table.txt")).click()
    await expect(page.locator(".preview-text")).to_contain_text("2oob_A")
    # the address says where one is: a reload shows the same, Back leads back
    await page.reload()
    await expect(page.locator(".preview-text")).to_contain_text("2oob_A")
    await page.go_back()
    await expect(page.get_by_text("No file chosen")).to_be_visible()


async def test_dropped_files_and_directories_are_submitted(
    site: Server, new_page: NewPage, tmp_path: Path
) -> None:
    page = await new_page(f"{site.url}/ui/#/submit")
    await drop(page, {"run.sh": "cat a.txt data/deep/b.txt", "a.txt": "from a\n"})
    await expect(page.locator("#script")).to_have_value("cat a.txt data/deep/b.txt")
    (tmp_path / "folder" / "data" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "data" / "deep" / "b.txt").write_text("from b\n")
    await page.locator("#folder").set_input_files(tmp_path / "folder")
    await expect(page.get_by_text("data/deep/b.txt", exact=True)).to_be_visible()
    await page.get_by_label("Name").fill("dropped")
    await page.get_by_text("More: priority").click()
    await page.get_by_label("Tags").fill("project:drop stage:1")
    curl_line = page.get_by_label("The same with curl")
    await expect(curl_line).to_contain_text("-F 'file=@data/deep/b.txt;filename=data/deep/b.txt'")
    await page.get_by_role("button", name="Submit", exact=True).click()
    await expect(page.locator(".job-state .state")).to_have_text("Completed")
    await expect(page.locator(".log-lines")).to_contain_text("from b")
    await expect(page.get_by_role("heading", name=re.compile("dropped"))).to_be_visible()
    await page.get_by_role("link", name="project:drop").click()
    await expect(page.locator(".job-table tbody tr")).to_have_count(1)


async def test_a_refused_upload_says_why_and_can_be_mended(site: Server, new_page: NewPage) -> None:
    page = await new_page(f"{site.url}/ui/#/submit")
    await page.get_by_text("More: priority").click()
    await page.get_by_label("Priority").fill("5000")
    await page.get_by_role("button", name="Submit", exact=True).click()
    await expect(page.get_by_role("alert").filter(has_text="priority")).to_be_visible()
    await page.get_by_label("Priority").fill("50")
    await page.get_by_role("button", name="Submit", exact=True).click()
    await expect(page.locator(".job-state .state")).to_have_text("Completed")


async def test_an_upload_can_be_given_up(site: Server, new_page: NewPage) -> None:
    page = await new_page(f"{site.url}/ui/#/submit")
    await page.locator(".submit").wait_for()
    session = await page.context.new_cdp_session(page)
    await session.send("Network.enable")
    await session.send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 50_000},
    )
    before = site.query("SELECT count(*) FROM job")
    await page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(8_000_000)], 'large.bin'));
            const input = document.querySelector('#files');
            input.files = transfer.files;
            input.dispatchEvent(new Event('change'));
        }"""
    )
    await page.get_by_role("button", name="Submit", exact=True).click()
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.get_by_text("nothing was submitted")).to_be_visible()
    await expect(page.get_by_role("button", name="Submit", exact=True)).to_be_visible()
    assert site.query("SELECT count(*) FROM job") == before


async def test_a_log_is_read_while_it_comes_and_the_job_is_terminated(
    site: Server, new_page: NewPage
) -> None:
    job = await site.upload(PRINTS)
    page = await new_page(f"{site.url}/ui/#/jobs/{job}")
    await expect(page.locator(".job-state .state")).to_have_text("Running")
    await expect(page.locator(".log-lines")).to_contain_text("line 3 of stdout")
    await expect(page.locator(".log-lines")).to_contain_text("oops 3")
    await page.get_by_role("button", name="stderr").click()
    await expect(page.locator(".log-lines")).to_contain_text("oops 5")
    assert "stdout" not in "".join(await log_lines(page))
    await page.get_by_role("button", name="Terminate").click()
    await page.get_by_role("dialog").get_by_role("button", name="Terminate").click()
    await expect(page.locator(".job-state .state")).to_have_text("Killed")
    await expect(page.locator(".log-state")).to_have_text("")
    await expect(page.get_by_role("button", name="Terminate")).to_have_count(0)
    await page.get_by_role("link", name="History").click()
    await expect(page.get_by_role("region", name="History")).to_contain_text("terminated")


async def test_following_stops_when_one_scrolls_up_and_begins_again_at_the_end(
    site: Server, new_page: NewPage
) -> None:
    script = "for i in $(seq 1 3000); do echo row $i; done; " + PRINTS
    job = await site.upload(script)
    page = await new_page(f"{site.url}/ui/#/jobs/{job}")
    log = page.locator(".log-lines")
    follow = page.get_by_role("button", name="Follow")
    await expect(log).to_contain_text("line 2 of stdout")
    await expect(follow).to_have_attribute("aria-pressed", "true")
    await log.evaluate("log => { log.scrollTop -= 900; }")
    await expect(follow).to_have_attribute("aria-pressed", "false")
    seen = await log.evaluate("log => log.scrollTop")
    await page.wait_for_function("() => document.querySelectorAll('.line').length > 0")
    await page.wait_for_timeout(700)
    assert abs(await log.evaluate("log => log.scrollTop") - seen) < 3
    # up to the first line, though the page holds a part only
    for _ in range(60):
        await log.evaluate("log => { log.scrollTop = 0; }")
        await page.wait_for_timeout(30)
        if await page.locator('.line[data-line="0"]').count():
            break
    await expect(page.locator('.line[data-line="0"] .line-text')).to_have_text("row 1")
    assert await page.locator(".line").count() <= 2100
    await page.keyboard.press("f")
    await expect(follow).to_have_attribute("aria-pressed", "true")
    await expect(page.locator(".line").last.locator(".line-text")).to_contain_text(
        re.compile("of stdout|oops")
    )
    await curl("-X", "POST", f"{site.url}/terminate/{job}")


async def test_colours_search_and_wrapping_of_a_log(site: Server, new_page: NewPage) -> None:
    script = (
        r"printf '\033[1;31mred\033[0m plain \033[38;5;208morange\033[0m\n';"
        r"printf 'ten%%\rhundred%%\n'; for i in $(seq 1 2500); do echo row $i; done;"
        "echo needle one; head -c 9000 /dev/zero | tr '\\0' x; echo; echo needle two"
    )
    job = await site.upload(script)
    await site.wait(job, "Completed")
    page = await new_page(f"{site.url}/ui/#/jobs/{job}")
    await expect(page.locator(".log-lines")).to_contain_text("needle two")
    await page.keyboard.press("/")
    await page.keyboard.type("needle")
    await expect(page.locator(".log-found")).to_have_text("2 of 2")
    await page.keyboard.press("Enter")
    await expect(page.locator(".log-found")).to_have_text("1 of 2")
    await expect(page.locator("[data-found] mark")).to_have_text("needle")
    await page.get_by_role("searchbox").fill("plain ORANGE")
    await expect(page.locator(".log-found")).to_have_text("1 of 1")
    line = page.locator('.line[data-line="0"]')
    await expect(line.locator(".ansi-1.ansi-bold")).to_have_text("red")
    assert await line.locator("mark").all_inner_texts() == ["plain ", "orange"]
    await expect(page.locator('.line[data-line="1"] .line-text')).to_have_text("hundred%")
    await page.get_by_role("searchbox").fill("needle two")
    await expect(page.locator(".log-found")).to_have_text("1 of 1")
    log = page.locator(".log-lines")
    assert await log.evaluate("log => log.scrollWidth > log.clientWidth")
    await page.get_by_role("button", name="Wrap").click()
    assert await log.evaluate("log => log.scrollWidth <= log.clientWidth")


async def test_many_jobs_are_selected_and_terminated_run_again_and_deleted(
    site: Server, new_page: NewPage
) -> None:
    jobs = [await site.upload("sleep 600", user=77) for _ in range(3)]
    page = await new_page(f"{site.url}/ui/#/jobs?user=77")
    rows = page.locator(".job-table tbody tr")
    await expect(rows).to_have_count(3)
    await page.get_by_label(f"Select job {jobs[0]}").check()
    await page.get_by_label(f"Select job {jobs[2]}").click(modifiers=["Shift"])
    await expect(page.get_by_role("toolbar")).to_contain_text("3 selected")
    await page.get_by_role("toolbar").get_by_role("button", name="Terminate").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("Terminate 3 jobs?")
    await dialog.get_by_role("button", name="Cancel").click()
    assert {site.transitions(job)[-1] for job in jobs} <= {
        "Queued",
        "Processing",
        "Submitted",
        "Running",
    }
    await page.get_by_role("toolbar").get_by_role("button", name="Terminate").click()
    await dialog.get_by_role("button", name="Terminate 3 jobs").click()
    await expect(page.get_by_text("Terminated 3 jobs.")).to_be_visible()
    await expect(page.locator(".job-table .state[data-state=Killed]")).to_have_count(3)
    await page.get_by_label("Select all jobs of this page").check()
    await page.get_by_role("toolbar").get_by_role("button", name="Delete").click()
    await dialog.get_by_role("button", name="Delete 3 jobs").click()
    await expect(page.locator(".job-table .state[data-state=Cleaned]")).to_have_count(3)
    await page.get_by_text(f"#{jobs[0]}", exact=True).click()
    await expect(page.locator(".job-state")).to_contain_text("It had ended as Killed")
    await expect(page.get_by_role("alert")).to_contain_text("output")


async def test_filters_are_typed_proposed_and_kept_in_the_address(
    site: Server, new_page: NewPage
) -> None:
    job = await site.upload("echo no >&2; exit 3", user=5, service="docking")
    await site.wait(job, "Failed")
    page = await new_page(f"{site.url}/ui/#/jobs")
    await page.locator("#filter").wait_for()
    await page.keyboard.press("/")
    await page.keyboard.type("service:d")
    await expect(page.get_by_role("option")).to_have_text("service:docking")
    await page.keyboard.press("ArrowDown")
    await page.keyboard.press("Enter")
    await page.keyboard.type("status:failed user:5 since:1h code")
    await page.keyboard.press("Enter")
    await expect(page.locator(".job-table tbody tr")).to_have_count(1)
    assert "service=docking" in page.url
    assert "status=Failed" in page.url
    await page.reload()
    await expect(page.locator("#filter")).to_have_value(
        "service:docking status:Failed user:5 since:1h code"
    )
    await expect(page.locator(".job-table tbody tr")).to_have_count(1)
    await page.locator("#filter").fill("colour:red")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("There is no filter “colour”")
    await page.locator("#filter").fill("user:123456")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("No job matches")).to_be_visible()
    await page.go_back()
    await expect(page.locator(".job-table tbody tr")).to_have_count(1)


async def test_lists_and_numbers_are_live(site: Server, new_page: NewPage) -> None:
    page = await new_page(f"{site.url}/ui/#/jobs?user=88")
    await expect(page.get_by_text("No job matches")).to_be_visible()
    overview = await new_page(f"{site.url}/ui/")
    await expect(overview.locator(".lamp")).to_have_text("Live")
    await expect(page.locator(".lamp")).to_have_text("Live")
    job = await site.upload("sleep 600", user=88)
    await expect(page.locator(".job-table .state[data-state=Running]")).to_have_count(1)
    await expect(overview.locator(f'.recent-row[href="#/jobs/{job}"] .state')).to_have_text(
        "Running"
    )
    await expect(overview.locator('[data-tile="Running"] .tile-number')).to_have_text("1")
    await curl("-X", "POST", f"{site.url}/terminate/{job}")
    await expect(page.locator(".job-table .state[data-state=Killed]")).to_have_count(1)
    await expect(overview.locator('[data-tile="Running"] .tile-number')).to_have_text("0")
    await expect(overview.locator(".tile-split")).to_contain_text("Killed")


async def test_everything_can_be_reached_with_the_keyboard(site: Server, new_page: NewPage) -> None:
    for _ in range(2):
        await site.wait(await site.upload("true", user=66), "Completed")
    page = await new_page(f"{site.url}/ui/")
    await expect(page.locator(".lamp")).to_have_text("Live")
    await page.keyboard.press("?")
    await expect(page.get_by_role("dialog")).to_contain_text("Next, previous job")
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
    for keys, title in (
        ("gj", "Jobs"),
        ("ga", "Agents"),
        ("gv", "Services"),
        ("gs", "Submit a job"),
    ):
        await page.keyboard.type(keys)
        await expect(page).to_have_title(f"{title} · Orchestrator")
    await page.goto(f"{site.url}/ui/#/jobs?user=66")
    await expect(page.locator(".job-table tbody tr")).to_have_count(2)
    await page.keyboard.type("jjkx")
    await expect(page.get_by_role("toolbar")).to_contain_text("1 selected")
    await expect(page.locator(".job-table tbody tr").first).to_have_class(re.compile("is-selected"))
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("toolbar")).to_have_count(0)
    await page.keyboard.type("jj")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_contain_text("example job")
    await page.keyboard.press("2")
    await expect(page.locator(".tree")).to_contain_text("stdout.log")


async def test_previews_show_text_tables_and_images_and_run_nothing(
    site: Server, new_page: NewPage
) -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
        "<script>alert(1)</script></svg>"
    )
    job = await site.upload(
        "mkdir -p out/deep; echo deep > out/deep/x.txt; echo '%PDF-1.4' > a.pdf; ln -s run.sh link",
        {
            "t.csv": b'name,value\n"a, ""b""",1\nc,2.5\n',
            "p.svg": svg.encode(),
            "b.html": b"<script>document.title='owned'</script>",
            "n.bin": b"\0\1\2" * 50,
            "big.txt": b"0123456789abcde\n" * 40_000,
        },
    )
    await site.wait(job, "Completed")
    page = await new_page(f"{site.url}/ui/#/jobs/{job}?tab=files")
    preview = page.locator(".preview")

    async def choose(name: str) -> None:
        await (
            page.locator(".tree")
            .get_by_role("link", name=re.compile(rf"^{re.escape(name)}"))
            .click()
        )

    await choose("t.csv")
    await expect(preview.locator("tbody td")).to_have_text(['a, "b"', "1", "c", "2.5"])
    await choose("p.svg")
    await expect(preview.locator("img")).to_be_visible()
    assert (
        await preview.locator("img").evaluate(
            "image => image.decode().then(() => image.naturalWidth)"
        )
        == 9
    )
    await choose("b.html")
    await expect(preview.locator(".preview-text")).to_have_text(
        "<script>document.title='owned'</script>"
    )
    await choose("n.bin")
    await expect(preview).to_contain_text("Not a text")
    await choose("a.pdf")
    await expect(preview).to_contain_text("Download it")
    await choose("link")
    await expect(preview).to_contain_text("not followed")
    await choose("big.txt")
    await expect(preview).to_contain_text("The first 256 KiB of 625 KiB.")
    await page.get_by_role("button", name=re.compile("^deep")).click()
    await choose("x.txt")
    await expect(preview.locator(".preview-text")).to_have_text("deep\n")
    assert "owned" not in await page.title()


async def test_names_full_of_markup_and_control_characters_only_show(
    site: Server, new_page: NewPage
) -> None:
    evil = "<img src=x onerror=alert(1)>\u202egnp.exe"
    file = '<b onclick=alert(1)>"&amp;.txt'
    script = (
        r"printf '<script>alert(1)</script>\033]0;title\007\001 \342\200\256 \033[2J\033[31mred\n';"
        f"touch $'a\\tb' $'{file}'; echo '<i>x</i>' >&2; exit 7"
    )
    await drop_free_upload(site, evil, file, script)
    (job,) = site.query("SELECT max(id) FROM job")[0]
    await site.wait(job, "Failed")
    page = await new_page(f"{site.url}/ui/#/jobs/{job}")
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    await expect(page.get_by_role("heading", level=1)).to_contain_text(
        "<img src=x onerror=alert(1)>\\u202egnp.exe"
    )
    await expect(page.locator(".log-lines")).to_contain_text(
        "<script>alert(1)</script>␁ \\u202e red"
    )
    await page.keyboard.press("2")
    await page.locator(".tree").get_by_role("link", name=re.compile("onclick")).click()
    await expect(page.locator(".preview h2")).to_have_text(file)
    await page.keyboard.press("3")
    await expect(page.get_by_role("region", name="History")).to_be_visible()
    await page.goto(f"{site.url}/ui/#/jobs?tag=evil:<script>alert(1)</script>")
    await expect(page.locator(".job-table .tag")).to_have_text("evil:<script>alert(1)</script>")
    await page.goto(f"{site.url}/ui/")
    await expect(page.locator(".recent-title").first).to_contain_text("<img src=x")
    await page.goto(f"{site.url}/ui/#/<script>alert(1)</script>")
    await expect(page.get_by_text("There is no such page.")).to_be_visible()
    assert dialogs == []


async def drop_free_upload(site: Server, name: str, file: str, script: str) -> None:
    """Upload a job with names that no shell and no file system need to see."""
    folder = site.directory / "hostile"
    folder.mkdir(exist_ok=True)
    (folder / "run.sh").write_text(script)
    (folder / "plain").write_text("plain")
    quoted = file.replace('"', '\\"')
    answer = await curl(
        *(f"{site.url}/upload", "-F", "file=@run.sh", "-F", f'file=@plain;filename="{quoted}"'),
        *("-F", "user_id=1", "-F", "service=example", "--form-string", f"name={name}"),
        *("--form-string", "tag=evil:<script>alert(1)</script>"),
        cwd=folder,
    )
    assert answer.status == 201, answer


async def test_agents_are_drained_and_resumed_and_services_shown(
    site: Server, new_page: NewPage
) -> None:
    page = await new_page(f"{site.url}/ui/#/agents")
    card = page.get_by_role("article", name="local")
    await card.get_by_role("button", name="Drain").click()
    await expect(card).to_contain_text("drained")
    await page.goto(f"{site.url}/ui/")
    await expect(page.locator(".attention")).to_contain_text("local is drained and gets no jobs.")
    job = await site.upload("true", user=9)
    await page.goto(f"{site.url}/ui/#/jobs/{job}")
    await expect(page.locator(".job-state")).to_contain_text("Waits: ")
    await page.goto(f"{site.url}/ui/#/agents")
    await card.get_by_role("button", name="Resume").click()
    await expect(card).to_contain_text("connected")
    await site.wait(job, "Completed")
    await page.goto(f"{site.url}/ui/#/services")
    await expect(page.get_by_role("row", name=re.compile("docking"))).to_contain_text("1 h")
    assert (PROJECT / "dashboard").is_dir()
