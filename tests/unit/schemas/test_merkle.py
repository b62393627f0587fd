"""Against the reference vectors of the Certificate Transparency project (RFC 6962's tree over eight known leaves)."""

from __future__ import annotations

import pytest
from casemate_schemas.errors import ReleaseError
from casemate_schemas.merkle import check_inclusion, inclusion_path, leaf_hash, root_hash
from hypothesis import given
from hypothesis import strategies as st

LEAVES = [
    b"",
    b"\x00",
    b"\x10",
    b"\x20\x21",
    b"\x30\x31",
    b"\x40\x41\x42\x43",
    bytes(range(0x50, 0x58)),
    bytes(range(0x60, 0x70)),
]
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


@pytest.mark.parametrize(("size", "root"), ROOTS.items())
def test_roots_of_the_reference_tree(size: int, root: str) -> None:
    assert root_hash([leaf_hash(leaf) for leaf in LEAVES[:size]]).hex() == root


@given(st.integers(1, 70), st.data())
def test_every_leaf_is_proven_and_nothing_else_is(size: int, data: st.DataObject) -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(size)]
    index = data.draw(st.integers(0, size - 1))
    path, root = inclusion_path(leaves, index), root_hash(leaves)
    check_inclusion(leaves[index], index, size, path, root)
    wrong = data.draw(
        st.sampled_from(
            [
                (leaf_hash(b"other"), index, size, path, root),
                (leaves[index], index, size, path, bytes(32)),
                (leaves[index], index, size, (*path, bytes(32)), root),
                (leaves[index], size, size, path, root),
                (leaves[index], -1, size, path, root),
            ]
        )
    )
    with pytest.raises(ReleaseError):
        check_inclusion(*wrong)


@given(st.integers(2, 70), st.data())
def test_a_proof_is_for_one_place_only(size: int, data: st.DataObject) -> None:
    leaves = [leaf_hash(bytes([i])) for i in range(size)]
    index, other = data.draw(st.permutations(range(size)))[:2]
    with pytest.raises(ReleaseError):
        check_inclusion(leaves[index], other, size, inclusion_path(leaves, index), root_hash(leaves))
