"""Who is let in, and what is served to whom."""

from __future__ import annotations

import http.client
from types import SimpleNamespace

import pytest

HTML = "text/html; charset=utf-8"


def ask(
    site: SimpleNamespace,
    path: str,
    method: str = "GET",
    body: bytes | None = None,
    token: str | None = None,
    **headers,
):
    """Return (status, headers, text) of a request; the token is sent as a header unless `token` says otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", site.server.server_port, timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    given = site.server.token if token is None else token
    if given and "Cookie" not in sent:
        sent["Authorization"] = f"Bearer {given}"
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def test_the_token_of_the_address_becomes_a_cookie(site) -> None:
    status, headers, text = ask(site, "/", token="")
    assert status == 401 and "posttrain ui" in text and "first" not in text
    assert ask(site, "/?token=wrong", token="")[0] == 401 and ask(site, "/", token="wrong")[0] == 401
    status, headers, _ = ask(site, f"/?token={site.server.token}", token="")
    name, _, rest = headers["Set-Cookie"].partition("=")
    assert (status, headers["Location"]) == (303, "/") and name == f"posttrain-{site.server.server_port}"
    assert rest == f"{site.server.token}; HttpOnly; SameSite=Strict; Path=/"
    status, headers, text = ask(site, "/", token="", Cookie=f"other=1; {name}={site.server.token}")
    assert status == 200 and headers["Content-Type"] == HTML and "first" in text
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    assert site.server.token not in text


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example:80"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}], ids=str
)
def test_other_sites_get_nothing(site, headers) -> None:
    """A name that points to this machine (DNS rebinding), or a page that embeds or fetches ours."""
    status, _, text = ask(site, "/", **headers)
    assert status == 403 and "first" not in text


def test_actions_need_the_origin_of_the_page(site) -> None:
    cookie = {"Cookie": f"posttrain-{site.server.server_port}={site.server.token}"}
    json_ = {"Content_Type": "application/json"}
    for origin in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert ask(site, "/stop", "POST", b"{}", **cookie, **json_, **origin)[0] == 403
    assert ask(site, "/nothing", "POST", b"{}", **cookie, **json_, Origin=site.base.rstrip("/"))[0] == 404
    assert ask(site, "/stop", "POST", b"a=1", Content_Type="application/x-www-form-urlencoded")[0] == 415


@pytest.mark.parametrize("run", ["/etc", "../..", "{root}/../other", "{root}", "{root}/first/stages", "{root}/nothing"])
def test_only_runs_of_the_folders_are_served(site, run) -> None:
    outside = site.root.parent / "other"
    outside.mkdir(exist_ok=True)
    (outside / "recipe.yaml").write_text("name: other")
    (outside / "manifest.json").write_text("{}")
    for page in ("/run", "/rows", "/report"):
        status, _, text = ask(site, f"{page}?run={run.format(root=site.root)}")
        assert status == 404 and "there is no run" in text


def test_a_report_has_an_origin_of_its_own(site) -> None:
    """Its file may come from somebody else: its scripts must not act with the cookie of the pages."""
    (site.root / "first" / "report.html").write_text("<script>1</script>")
    _, headers, text = ask(site, f"/report?run={site.root}/first")
    assert text == "<script>1</script>" and headers["Content-Security-Policy"].startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in headers["Content-Security-Policy"]
    assert ask(site, f"/report?run={site.root}/going")[0] == 404


def test_what_is_wrong_with_a_query_is_told(site) -> None:
    first = f"{site.root}/first"
    for query, words in (
        (f"/compare?run={first}", "1 runs are selected"),
        (f"/rows?run={first}&low=much", "expected a number"),
        (f"/rows?run={first}&order=random", "expected newest"),
        (f"/rows?run={first}&at=x", "no place"),
        (f"/rows?run={first}&rows=stages/1-sft/data/rows.jsonl&at=1.5", "no place"),
    ):
        status, _, text = ask(site, query)
        assert status == 400 and words in text, query
    status, _, text = ask(site, f"/rows?run={first}&rows=../../secret.jsonl")
    assert status == 404 and "has stored no" in text
    assert ask(site, "/static/run.html.j2")[0] == ask(site, "/nothing")[0] == 404
