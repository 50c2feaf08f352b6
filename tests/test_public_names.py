"""What `import sparsewsi` offers."""

import pytest

from sparsewsi.model.sparse_wsi import SparseWSI


def test_public_names_are_where_the_package_says() -> None:
    import sparsewsi

    for name in sparsewsi.__all__:
        assert getattr(sparsewsi, name) is not None
    assert sparsewsi.SparseWSI is SparseWSI
    with pytest.raises(AttributeError, match="no attribute 'SparseLearn'"):
        sparsewsi.SparseLearn  # noqa: B018
