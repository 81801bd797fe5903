"""Slow and plain: every metric written as loops straight from its definition, to judge the fast ones."""

import math


def right_ones(ranking: list[int], positives: set[int]) -> list[bool]:
    return [row in positives for row in ranking if row != -1]


def average_precision(right: list[bool], positives: int, k: int, normaliser: str) -> float:
    total = found = 0
    for rank, hit in enumerate(right[:k], 1):
        if hit:
            found += 1
            total += found / rank
    divisor = {"positives": positives, "min": min(positives, k), "hits": found}[normaliser]
    return total / divisor if divisor else 0.0


def ndcg(right: list[bool], positives: int, k: int) -> float:
    gained = sum(1 / math.log2(rank + 1) for rank, hit in enumerate(right[:k], 1) if hit)
    return gained / sum(1 / math.log2(rank + 1) for rank in range(1, min(positives, k) + 1))


def reciprocal_rank(right: list[bool], k: int) -> float:
    return next((1 / rank for rank, hit in enumerate(right[:k], 1) if hit), 0.0)


def metrics(ranking: list[int], positives: set[int], k: int, depth: int) -> dict[str, float]:
    "All metrics of one query that has positives; `depth` is the width of the rankings array."
    right, n = right_ones(ranking, positives), len(positives)
    return {
        f"MAR@{k}": sum(right[:k]) / n,
        f"recall@{k}": sum(right[:k]) / n,
        f"hit@{k}": float(any(right[:k])),
        f"Prec@{k}": sum(right[:k]) / k,
        f"P@{k}": sum(right[:k]) / k,
        f"mAP@{k}": average_precision(right, n, k, "positives"),
        f"mAP@{k}/min": average_precision(right, n, k, "min"),
        f"mAP@{k}/hits": average_precision(right, n, k, "hits"),
        "mAP": average_precision(right, n, 10**9, "positives"),
        "mAP/min": average_precision(right, n, depth, "min"),
        "MRR": reciprocal_rank(right, 10**9),
        f"MRR@{k}": reciprocal_rank(right, k),
        f"nDCG@{k}": ndcg(right, n, k),
        "nDCG": ndcg(right, n, 10**9),
        "R-precision": sum(right[:n]) / n,
        "MAP@R": average_precision(right, n, n, "positives"),
    }


def by_label(gallery: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for item, label in gallery.items():
        groups.setdefault(label, []).append(item)
    return groups


def product1m(gallery: dict[str, str], queries: dict[str, list[str]], lines: list[tuple[str, list[str]]], n: int) -> tuple:
    "mAP, Prec and mAR at n as the release defines them: the mean over the lines of the ranking, faults included."
    sums, groups = [0.0, 0.0, 0.0], by_label(gallery)
    for query, items in lines:
        ap, precision, recall = release_line(gallery, groups, queries.get(query), items, n)
        sums = [sums[0] + ap, sums[1] + precision, sums[2] + recall]
    return tuple(total / len(lines) for total in sums)


def release_line(gallery: dict, groups: dict, labels: list[str] | None, items: list[str], n: int) -> tuple:
    "One line; what cannot be scored counts 0 from there on."
    if labels is None or any(label not in groups for label in labels) or not items:
        return 0.0, 0.0, 0.0
    k = min(n, sum(len(groups[label]) for label in labels), len(items))
    right = [gallery.get(item) in labels for item in items[:k]]
    ap, precision = average_precision(right, 0, k, "hits"), sum(right) / k
    if any(item not in gallery for item in items[:n]):
        return ap, precision, 0.0
    return ap, precision, release_recall(gallery, groups, labels, items[:n], n)


def release_recall(gallery: dict, groups: dict, labels: list[str], items: list[str], n: int) -> float:
    total = 0.0
    for label in set(labels):
        expected = min(math.floor(n / len(labels)) * labels.count(label), len(groups[label]))
        found = sum(gallery[item] == label for item in items)
        if not expected:
            return 0.0
        total += min(found, expected) / expected
    return total / len(set(labels))


def strict_product1m(gallery: dict, queries: dict, lines: list, n: int) -> tuple:
    "The stricter definition: AP over min(positives, n), precision over n, expectations rounded."
    sums, groups = [0.0, 0.0, 0.0], by_label(gallery)
    for query, items in lines:
        labels, seen, right = queries.get(query, []), set(), []
        for item in items:
            right.append(gallery.get(item) in labels and item not in seen)
            seen.add(item)
        positives = sum(len(groups.get(label, [])) for label in set(labels))
        recall = strict_recall(gallery, groups, labels, list(dict.fromkeys(items[:n])), n)
        values = average_precision(right, positives, n, "min"), sum(right[:n]) / n, recall
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    return tuple(total / len(lines) for total in sums)


def strict_recall(gallery: dict, groups: dict, labels: list[str], items: list[str], n: int) -> float:
    total = 0.0
    for label in set(labels):
        expected = min(max(1, round(n * labels.count(label) / len(labels))), len(groups.get(label, [])))
        found = sum(gallery.get(item) == label for item in items)
        total += min(found, expected) / expected if expected else 0.0
    return total / len(set(labels)) if labels else 0.0
