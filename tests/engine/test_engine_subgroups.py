"""Which subgroup a case belongs to, and which cases show nearly the same."""

import types

import pytest

from knowsam.engine.subgroups import domains, near_duplicates, subgroups
from knowsam.errors import DataError, NotFoundError

CASES = ["north/a", "north/b", "south/deep/c", "d"]


def source(folder=None, **domain_of):
    made = types.SimpleNamespace(splits=types.SimpleNamespace(folder=folder))
    if domain_of:
        made.domain = domain_of.get
    return made


def test_folders_of_the_ids():
    found, by = subgroups("folder", source(), CASES)
    assert (found, by) == ({"north/a": "north", "north/b": "north", "south/deep/c": "south/deep"}, "folder")
    with pytest.raises(DataError, match="no id names a folder, 'd' for one"):
        subgroups("folder", source(), ["d"])


def test_columns_of_tables(tmp_path):
    (tmp_path / "mine.csv").write_text("id,scanner,group\nnorth/a,A,p1\nd,B,p2\nnorth/b,,p3\nelse,C,p4\n")
    table = f"{tmp_path}/mine.csv"
    assert subgroups(f"{table}:scanner", source(), CASES) == ({"north/a": "A", "d": "B"}, "scanner")
    assert subgroups(table, source(), CASES)[0] == {"north/a": "p1", "d": "p2", "north/b": "p3"}
    with pytest.raises(DataError, match="there is no column 'site'; the columns are id, scanner, group"):
        subgroups(f"{table}:site", source(), CASES)
    with pytest.raises(DataError, match=r"none of the 1 cases is in .*: the ids there are 'north/a', 'd', 'else'"):
        subgroups(f"{table}:scanner", source(), ["x"])
    with pytest.raises(NotFoundError):
        subgroups(f"{tmp_path}/none.csv:scanner", source(), CASES)


def test_columns_of_the_table_beside_the_lists(tmp_path):
    (tmp_path / "groups.csv").write_text("id,group,site\nd,p1,Oslo\n")
    assert subgroups("site", source(tmp_path), CASES) == ({"d": "Oslo"}, "site")
    with pytest.raises(NotFoundError, match=r"--by site: there is no groups.csv beside the split lists") as error:
        subgroups("site", source(None), CASES)
    assert "Allowed: folder, domain" in error.value.hint


def test_domains_of_the_source():
    named = source(**{"north/a": "kvasir", "d": "fuseg"})
    assert domains(named, CASES) == {"north/a": "kvasir", "d": "fuseg"} == subgroups("domain", named, CASES)[0]
    assert domains(source(), CASES) == {}
    with pytest.raises(DataError, match="the data name no domain"):
        subgroups("domain", source(), CASES)


def test_near_duplicates_are_those_among_the_cases(tmp_path):
    assert near_duplicates(source(tmp_path), CASES) == {}
    (tmp_path / "near_duplicates.csv").write_text(
        "id,group\nnorth/a,1\nd,1\nnorth/b,2\ntrain_7,2\nother,3\nanother,3\n"
    )
    assert near_duplicates(source(tmp_path), CASES) == {"north/a": "1", "d": "1"}
    assert near_duplicates(source(None), CASES) == {}
