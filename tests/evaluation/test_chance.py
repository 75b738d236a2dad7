from scipy.stats import binomtest

from dfs_cli.evaluation.chance import better_than_chance


def test_better_than_chance() -> None:
    # 4 of 4 right among 10 classes by chance: 1e-4; 1 of 1: 0.1. 15 of 100 or more right: 0.073; 18 or more: 0.0100.
    assert better_than_chance(100.0, 4, 10)
    assert not better_than_chance(100.0, 1, 10)
    assert not better_than_chance(15.0, 100, 10)
    assert better_than_chance(20.0, 100, 10)
    assert not better_than_chance(0.0, 450, 10)
    assert better_than_chance(1.0, 5000, 1000)


def test_it_is_scipys_test() -> None:
    for images, classes in ((1, 2), (7, 10), (450, 10), (5000, 1000)):
        for right in {0, 1, images // classes, images // classes + 5, images} & set(range(images + 1)):
            p = binomtest(right, images, 1 / classes, alternative="greater").pvalue
            assert better_than_chance(100 * right / images, images, classes) == (p < 0.01)
