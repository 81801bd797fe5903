"""The published algorithm in dense form (Zhong et al., CVPR 2017), written plainly: the judge of `product_retrieval.rerank`."""

import numpy as np


def squared_distances(vectors):
    "Squared Euclidean distances of all pairs [items, items]."
    return np.stack([((vectors - one) ** 2).sum(1) for one in vectors])


def reciprocal(ranks, item, k):
    "The k + 1 first of the item's list (itself among them) whose own k + 1 first hold the item."
    return [other for other in ranks[item, : k + 1] if item in ranks[other, : k + 1]]


def encodings(original, ranks, k1):
    "One row an item: Gaussian weights on its expanded reciprocal neighbours, zeros elsewhere [items, items]."
    codes = np.zeros_like(original)
    for item in range(len(original)):
        first = reciprocal(ranks, item, k1)
        members = set(first)
        for candidate in first:
            second = reciprocal(ranks, candidate, int(np.around(k1 / 2)))
            if len(set(second) & set(first)) > 2 / 3 * len(second):
                members |= set(second)
        members = sorted(members)
        weights = np.exp(-original[item, members])
        codes[item, members] = weights / weights.sum()
    return codes


def rerank_dense(queries, gallery, k1=20, k2=6, weight=0.3, dtype=np.float64):
    "Final distances [queries, gallery] and the full rankings; ties by original distance, then by row."
    vectors = np.concatenate([queries, gallery]).astype(dtype)
    distances = squared_distances(vectors)
    first = distances - 2 * np.eye(len(vectors), dtype=dtype)  # an item heads its own list, also where it has twins
    ranks = np.argsort(first, axis=1, kind="stable")
    largest = distances.max(axis=1, keepdims=True)
    original = distances / np.where(largest > 0, largest, 1)
    codes = encodings(original, ranks, k1)
    if k2 > 1:
        codes = np.stack([codes[ranks[item, :k2]].mean(axis=0) for item in range(len(codes))])
    asked = len(queries)
    shared = np.stack([np.minimum(codes[q], codes[asked:]).sum(axis=1) for q in range(asked)])
    plain = original[:asked, asked:]
    final = (1 - weight) * (1 - shared / (2 - shared)) + weight * plain
    return final, np.stack([np.lexsort((plain[q], final[q].round(12))) for q in range(asked)])
