"""Results on the Hub: one commit with files, page and card; only our blocks of the card change; one-line errors.

The Hub is a server in this process that implements the part of the HTTP interface that huggingface_hub uses here.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from result_sets import DEMO, ROOT, write_changed, write_set

import delta_selectivity as ds
from delta_selectivity.api import hub as pushing
from delta_selectivity.cli import report
from delta_selectivity.reporting import output
from delta_selectivity.reporting.model_card import BODY_MARKS, MARKS, with_results
from delta_selectivity.system import hub_access

REPO = "someone/sae"
TOKEN = "hf_right"
WRITE_PAGE = output.write_page
K32 = DEMO / "tiny-pythia-saes-k32"
CARDS = {
    "none": "",
    "no metadata": "# An SAE\n\nText without an end",
    "metadata": "---\nlicense: mit  # ours\ntags: [sae, demo]\n---\n\n# An SAE\n\nText.\n",
    "windows": "---\r\nlicense: mit\r\n---\r\n# An SAE\r\n",
    "empty metadata": "---\n---\nText\n",
    "others' results": (
        "---\nmodel-index:\n  - name: other\n    results:\n      - task:\n          type: x\n        dataset:\n"
        "          name: y\n          type: y\n        metrics:\n          - type: acc\n            value: 0.5\n"
        "# of others\nlicense: mit\n---\nText\n"
    ),
    "the demo's": (ROOT / "assets" / "tiny-pythia-saes-k32" / "README.md").read_text("utf-8"),
    "rules in the text": "---\nlicense: mit\n---\nText\n\n---\n\nmodel-index: no\n\n---\nEnd\n",
}


class Hub:
    """A repository, and how the server misbehaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[dict] = []
        self.asked: list[str] = []
        self.drop: list[str] = []  # the next request whose path contains each of these is cut off
        self.fail: dict[str, int] = {}  # status of every request whose path contains the key
        self.lose_answer = False  # the next commit is made, but its response is lost

    @property
    def head(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files.items()))).encode()).hexdigest()

    def commit(self, lines: list[dict]) -> None:
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        self.commits.append(header)
        for line in lines:
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub = self.hub
        if self._stopped():
            return
        if self.path.startswith(f"/api/models/{REPO}"):
            self._answer(200, {"id": REPO, "sha": hub.head, "siblings": [], "private": False, "tags": []})
        elif self.path.startswith(f"/{REPO}/resolve/"):
            commit, _, name = self.path.removeprefix(f"/{REPO}/resolve/").partition("/")
            if name not in hub.files:
                self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            self._answer(200, hub.files[name], {"X-Repo-Commit": commit})
        else:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        hub, body = self.hub, self.rfile.read(int(self.headers["Content-Length"]))
        if self._stopped():
            return
        if self.path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            bad = "refused-by-the-hub" in content
            yaml.safe_load(content.split("---")[1])
            self._answer(400 if bad else 200, {"warnings": [], "errors": [{"message": '"license" is wrong'}] * bad})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                         for f in asked]})  # fmt: skip
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            if lines[0]["value"]["parentCommit"] != hub.head:
                self._answer(412, {"error": "the repository has changed"})
                return
            hub.commit(lines)
            if hub.lose_answer:
                hub.lose_answer = False
                self.close_connection = True
                return
            self._answer(
                200,
                {"success": True, "commitOid": hub.head, "commitUrl": f"{constants.ENDPOINT}/{REPO}/commit/{hub.head}"},
            )

    def _stopped(self) -> bool:
        """Return whether the request was refused or cut off."""
        hub = self.hub
        hub.asked.append(f"{self.command} {self.path}")
        cut = next((part for part in hub.drop if part in self.path), None)
        status = next((status for part, status in hub.fail.items() if part in self.path), None)
        token = self.headers.get("Authorization")
        if cut is not None:
            hub.drop.remove(cut)
            self.close_connection = True
        elif status is not None:
            self._answer(status, {"error": "as asked"})
        elif token not in (None, f"Bearer {TOKEN}"):
            self._answer(401, {"error": "Invalid username or password."})
        else:
            return False
        return True

    def _answer(self, status: int, content, headers=None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return an empty repository and a token for it; disable waiting."""
    repository = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Handler,), {"hub": repository}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", constants.ENDPOINT)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(pushing, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # drawing plots takes most of the time
    monkeypatch.setattr(output, "write_page", lambda study, path, with_rows: path.write_text(f"{with_rows}"))
    yield repository
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the kept demo without scores."""
    folder = tmp_path_factory.mktemp("kept") / K32.name
    return ds.Results.load(shutil.copytree(K32, folder, ignore=shutil.ignore_patterns("*.scores")))


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_push_is_one_commit(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(output, "write_page", WRITE_PAGE)
    paths = sorted(write_set(tmp_path, datasets=("gender", "athlete"), layers=[0]).rglob("*.json"))
    hub.files["README.md"] = CARDS["metadata"].encode()
    head = hub.head
    done = ds.Results.load(tmp_path).push_to_hub(REPO)
    (commit,) = hub.commits
    assert commit["parentCommit"] == head
    names = {f"delta_selectivity/{path.name}" for path in paths}
    assert hub.files.keys() == {"README.md", "delta_selectivity/report.html", *names}
    for path in paths:
        assert hub.files[f"delta_selectivity/{path.name}"] == path.read_bytes()
    assert hub.files["delta_selectivity/report.html"].startswith(b"<!DOCTYPE html>")
    assert done.url in str(done)
    assert dict(hub.files) == done.files


def test_the_metadata_has_task_dataset_metric_value_and_interval(hub, results):
    hub.files["README.md"] = CARDS["metadata"].encode()
    results.push_to_hub(REPO)
    text = hub.files["README.md"].decode()
    (entry,) = metadata(text)["model-index"]
    assert entry["name"] == "sae"
    found = {result["dataset"]["type"]: result for result in entry["results"]}
    assert found.keys() == {"all", *(f"wikidata_{name}" for name in
                                     ("athlete", "gender", "is_alive", "occupation", "politics"))}  # fmt: skip
    level = results.files[0][1]["_run"]["sae_level"]
    for metric in found["all"]["metrics"]:
        name = metric["type"]
        assert metric["value"] == pytest.approx(level[name], abs=1e-6)
        assert metric["args"]["low"] == pytest.approx(level[f"{name}_ci_low"], abs=1e-6)
        assert metric["args"]["high"] == pytest.approx(level[f"{name}_ci_high"], abs=1e-6)
    frame = results.to_frame()
    mean = frame[frame.dataset == "occupation"].transfer_r2.mean()
    (metric,) = (one for one in found["wikidata_occupation"]["metrics"] if one["type"] == "transfer_r2")
    assert metric["value"] == pytest.approx(mean, abs=1e-6)
    assert "args" not in metric, "the demo has no scores beside its files, so no interval of a single dataset"
    card = ModelCard(text)  # as the library reads it
    assert card.data.license == "mit"
    assert {(r.dataset_type, r.metric_type) for r in card.data.eval_results} == {
        (dataset, score) for dataset in found for score in ("transfer_r2", "delta_sel")
    }
    assert f"| wikidata_occupation | {mean:.3f} |" in text
    assert f"| all datasets | {level['transfer_r2']:.3f} [" in text


def test_a_dataset_has_its_own_interval_where_scores_are_there(hub, tiny_model, tiny_saes, people_csv):
    rows = people_csv.with_name("other.csv")
    rows.write_text("\n".join(people_csv.read_text("utf-8").splitlines()[:161]), "utf-8")
    settings = ds.Settings(folds=3, repeats=2)
    alone, both = (
        ds.evaluate(tiny_model, tiny_saes, tasks, layers=[0, 1], settings=settings, device="cpu")
        for tasks in ([rows], [people_csv, rows])
    )
    entries = metadata(both.push_to_hub(REPO, dry_run=True).files["README.md"].decode())["model-index"]
    (own,) = (one for one in entries[0]["results"] if one["dataset"]["type"] == "other")
    assert own["dataset"]["args"] == {"layers": [0, 1]}
    level = alone.files[0][1]["_run"]["sae_level"]  # of a run of this dataset alone
    for metric in own["metrics"]:
        expected = [level[f"{metric['type']}{end}"] for end in ("", "_ci_low", "_ci_high")]
        assert [metric["value"], metric["args"]["low"], metric["args"]["high"]] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", CARDS)
def test_repeated_pushes_change_only_our_blocks_of_the_card(name, hub, results):
    before = CARDS[name]
    if before:
        hub.files["README.md"] = before.encode()
    results.push_to_hub(REPO)
    once = hub.files["README.md"].decode()
    change = list(difflib.ndiff(before.splitlines(keepends=True), once.splitlines(keepends=True)))
    assert not [line for line in change if line[0] == "-" and line[2:].strip() not in before.splitlines()[-1:]]
    kept, ours = [], False
    for line in once.splitlines(keepends=True):
        ours = ours or line.strip() in (MARKS[0], BODY_MARKS[0])
        if not ours:
            kept.append(line)
        ours = ours and line.strip() not in (MARKS[1], BODY_MARKS[1])
    rest = "".join(kept).replace("\r", "")
    for added in ("model-index:\n",) if "model-index:\n" not in before else ():
        rest = rest.replace(added, "", 1)
    if not before.startswith("---"):
        rest = rest.removeprefix("---\n---\n")
    assert rest.rstrip("\n") == before.replace("\r", "").rstrip("\n")
    assert ("\r\n" in before) == ("\r\n" in once)
    assert once.count("\n") == once.count("\r\n") or "\r" not in once
    results.push_to_hub(REPO)
    assert hub.files["README.md"].decode() == once
    ModelCard(once)


def test_a_new_push_replaces_the_old_one(results):
    card = with_results(CARDS["others' results"], [entry(0.5)], "old\ntext")
    card = card.replace("Text\n", "Text\n\nMore.\n")
    card += "\nAfter.\n"
    again = with_results(card, [entry(0.7)], "new")
    assert metadata(again)["model-index"] == [metadata(CARDS["others' results"])["model-index"][0], entry(0.7)]
    assert "old" not in again
    assert again.endswith(f"new\n{BODY_MARKS[1]}\n\nAfter.\n")
    assert again == card.replace("0.5\n    source", "0.7\n    source").replace("old\ntext", "new").replace(
        "value: 0.5\n      source", "value: 0.7\n      source") or again.count("0.7") == 1  # fmt: skip


def entry(value):
    return {"name": "sae", "results": [{
        "task": {"type": "x"}, "dataset": {"name": "d", "type": "d"}, "metrics": [{"type": "m", "value": value}],
        "source": {"name": "Delta Selectivity", "url": "u"},
    }]}  # fmt: skip


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("---\nlicense: [\n---\n", "no YAML"),
        ("---\n- a\n---\n", "no mapping"),
        ("---\nmodel-index: [{name: a, results: []}]\n---\n", "in one line"),
        ("---\nmodel-index:\n- name: sae\n  results:\n  - source:\n      name: Delta Selectivity\n---\n", "by hand"),
    ],
)
def test_a_card_that_cannot_be_extended_is_not_changed(card, told, hub, results):
    hub.files["README.md"] = card.encode()
    with pytest.raises(ds.RequestError, match=told) as refused:
        results.push_to_hub(REPO)
    assert "\n" not in str(refused.value)
    assert hub.files == {"README.md": card.encode()}


@pytest.mark.parametrize(
    ("card", "told"),
    [(b"\xff\xfe text", "not UTF-8"), (b"---\nlicense: refused-by-the-hub\n---\n", '"license" is wrong')],
)
def test_an_invalid_card_is_one_line(card, told, hub, capsys):
    hub.files["README.md"] = card
    assert told in (line := refused(capsys))
    assert line.endswith("; nothing was written")
    assert hub.commits == []


def test_a_dry_run_prints_and_writes_nothing(hub, monkeypatch, capsys):
    hub.files["README.md"] = CARDS["metadata"].encode()
    monkeypatch.delenv("HF_TOKEN")
    assert report.main([str(DEMO), "--push_to_hub", REPO, "--sae", "k32", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "delta_selectivity/report.html (" in out
    assert "+model-index:" in out
    assert "+    metrics:" in out
    assert "\n-" not in out.replace("\n--- README.md", "")
    assert hub.commits == []
    assert not any(asked.startswith("POST") for asked in hub.asked)


def command(*more):
    return report.main([str(K32), "--push_to_hub", REPO, *more])


def refused(capsys, *more):
    assert command(*more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_no_token_is_one_line(hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert refused(capsys) == (
        "error: --push_to_hub: no token of the Hub: set HF_TOKEN, or log in with `hf auth login`"
    )
    assert hub.asked == []


@pytest.mark.parametrize(
    ("where", "status", "told"),
    [
        (f"/api/models/{REPO}", 404, "there is no such repository, or the token has no access to it"),
        ("/commit/", 403, "the token has no write access"),
        ("/commit/", 500, "the Hub responds with status 500"),
        ("/preupload/", 503, "the Hub responds with status 503"),
        ("/commit/", 429, "the Hub's rate limit is reached"),
    ],
)
def test_errors_of_the_hub_are_one_line(where, status, told, hub, capsys):
    hub.fail[where] = status
    assert told in (line := refused(capsys))
    assert line.startswith(f"error: --push_to_hub {REPO}: ")
    assert line.endswith("; nothing was written")
    assert hub.commits == []
    assert hub.files == {}


def test_a_wrong_token_is_one_line(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token is invalid" in refused(capsys)
    assert hub.commits == []


@pytest.mark.parametrize("where", [f"/api/models/{REPO}", "/resolve/", "/preupload/", "/commit/", "validate-yaml"])
def test_a_lost_connection_is_retried(where, hub, results):
    hub.drop = [where]
    results.push_to_hub(REPO)
    assert hub.drop == []
    assert len(hub.commits) == 1


def test_a_repeatedly_lost_connection_is_one_line(hub, capsys):
    hub.drop = ["/commit/"] * 50
    assert "the connection was lost" in refused(capsys)
    assert hub.commits == []
    assert sum("/commit/" in asked for asked in hub.asked) == 3


def test_a_commit_with_a_lost_response_is_not_repeated(hub, results):
    hub.lose_answer = True
    results.push_to_hub(REPO)
    once = dict(hub.files)
    assert all(once[path] == content for path, content in results.push_to_hub(REPO).files.items())
    assert once["README.md"].count(b"model-index") == 1


def test_concurrent_commits_of_others_are_kept(hub, results, monkeypatch):
    hub.files["README.md"] = CARDS["metadata"].encode()
    read = pushing._read_card

    def late(*asked):
        found = read(*asked)
        if not hub.commits:
            hub.commit([{"key": "header", "value": {}}])
            hub.files["README.md"] += b"\nOf others.\n"
        return found

    monkeypatch.setattr(pushing, "_read_card", late)
    results.push_to_hub(REPO)
    assert b"Of others." in hub.files["README.md"]
    assert b"model-index" in hub.files["README.md"]


def test_an_unreachable_hub_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_access, "_last_check", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(capsys) == f"error: --push_to_hub {REPO}: the Hub does not respond: check the connection"


def test_one_sae_is_chosen_and_named(hub, capsys, tmp_path):
    assert report.main([str(DEMO), "--push_to_hub", REPO]) == 2
    assert "--sae is missing: name one of" in capsys.readouterr().err
    for name in ("no-owner", "a/b/c", "a/..", ""):
        assert report.main([str(K32), "--push_to_hub", name]) == 2
        assert "OWNER/NAME is needed" in capsys.readouterr().err
    assert hub.asked == []
    assert report.main([str(K32), "--dry_run"]) == 2
    assert "--dry_run needs --push_to_hub" in capsys.readouterr().err


def test_runs_of_different_layers_get_separate_files(hub, tmp_path):
    one = write_set(tmp_path / "one", layers=[0], baselines=[("mean", "resid_post")])
    two = write_set(tmp_path / "two", layers=[1])
    found = ds.Results.load(one, two).push_to_hub(REPO, dry_run=True).files
    contents = [path.read_bytes() for path in (*one.glob("sae-00/*.json"), *two.glob("sae-00/*.json"))]
    assert sorted(found[name] for name in found if name.endswith(".json")) == sorted(contents)
    with pytest.raises(ds.RequestError, match="only baselines"):
        ds.Results.load(one / "baselines" / "01_mean").push_to_hub(REPO, dry_run=True)


@pytest.mark.parametrize(("keep_texts", "with_rows"), [("public", b"True"), ("all", b"False")])
def test_private_texts_are_not_published(keep_texts, with_rows, hub, tmp_path):
    (path,) = write_set(tmp_path / "in").rglob("*.json")
    changed = write_changed(path, tmp_path / "out" / path.name, config={"keep_texts": keep_texts})
    found = ds.Results.load(changed).push_to_hub(REPO, dry_run=True)
    assert found.files["delta_selectivity/report.html"] == with_rows
