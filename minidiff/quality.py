"""How good are samples? Three figures that a human can read, of any number of them."""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

BLOCK = 360  # samples that one support vector machine tells from as many of held-out data
CLEAR = .9  # a class with this probability is a clear one
SEEN = 60_000  # labelled samples at most that a classifier is trained on
PASSES = 50  # over them at most


def svm_accuracy(x, held, folds=5, *, show=False):
    """Five-fold accuracy of an RBF SVM that tells x from held-out data: .5 is perfect.

    They are compared in blocks of about BLOCK samples. So time grows like n, and the figure
    means the same for every n: a machine that sees more tells more. With n only its error
    becomes smaller.

    x, held: (n, ...) arrays of equal n; show: whether there is a progress bar. Returns
    (mean, standard error over the folds of all blocks).
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.svm import SVC
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    blocks = max(1, round(len(x) / BLOCK))
    pairs = zip(np.array_split(x, blocks), np.array_split(held, blocks))
    accuracy = []
    for pair in tqdm(pairs, "comparing", blocks, unit="block", disable=not show):
        points = np.concatenate(pair)
        is_sample = np.arange(len(points)) < len(pair[0])
        accuracy.extend(cross_val_score(SVC(), _flat(points), is_sample, cv=split))
    error = np.std(accuracy, ddof=1) / len(accuracy)**.5
    return float(np.mean(accuracy)), float(error)


def nearest_distance(x, train, *, show=False):
    """Median over x of the distance to the nearest training sample.

    x, train: arrays of samples, (n, ...) and (m, ...); show: whether there is a progress
    bar. A median far below that of held-out data means that the network memorised its
    training samples.
    """
    from sklearn.neighbors import NearestNeighbors
    nearest = NearestNeighbors(n_neighbors=1).fit(_flat(train))
    distances = []
    blocks = np.array_split(_flat(x), max(1, round(len(x) / BLOCK)))
    for block in tqdm(blocks, "nearest", unit="block", disable=not show):
        found, _ = nearest.kneighbors(block)
        distances.extend(found[:, 0])
    return float(np.median(distances))


def classifier(x, labels):
    """A small network, scikit-learn's, that is trained to name the class of real samples.

    It has one hidden layer. The last tenth of the samples it does not see, and the first
    60,000 of the others some ten times; fewer it sees more often. There is a progress bar.

    x: (n, ...); labels: (n,) whole numbers. Returns (a function from samples to the
    probability of each class, (n, classes); the share of the last tenth that it names
    right).
    """
    from sklearn.neural_network import MLPClassifier
    x = _flat(x)
    apart = len(x) - len(x) // 10
    seen = min(SEEN, apart)
    names = np.arange(labels.max() + 1)
    model = MLPClassifier((256,), random_state=np.random.RandomState(0))  # goes on a pass
    passes = min(PASSES, 10 * SEEN // seen)
    for _ in tqdm(range(passes), "classifier", unit="pass"):
        model.partial_fit(x[:seen], labels[:seen], classes=names)
    right = model.predict(x[apart:]) == labels[apart:]
    return lambda x: model.predict_proba(_flat(x)), float(right.mean())


def share_of(hits):
    """(share, its standard error) of the true ones, (n,)."""
    share = hits.mean()
    return float(share), float((share * (1 - share) / len(hits))**.5)


def _flat(x):
    """Samples as vectors, (n, D)."""
    return x.reshape(len(x), -1)


class Quality(NamedTuple):
    """How good samples are."""

    accuracy: float  # of an SVM that tells samples from held-out data: .5 is perfect
    error: float  # the accuracy's standard error
    nearest: float  # median distance to the closest training sample
    clear: float | None = None  # share that a classifier gives a class at .9, with labels
    clear_error: float | None = None  # that share's standard error
    named: float | None = None  # share that it gives the class that was asked for
    named_error: float | None = None  # that share's standard error


class Judge:
    """Holds samples against a data set.

    data: train and held, (n, *shape), on one scale; labels and held_labels, or None.
    show: whether comparisons have progress bars. `right` is the share of real samples that
    the classifier named right, None without labels.
    """

    def __init__(self, data, *, show=False):
        self.data = data
        self.show = show
        self.classify = None
        self.right = None
        labels = data.labels
        if labels is not None and len(np.unique(labels)) > 1:
            self.classify, self.right = classifier(data.train, labels)

    def __call__(self, x, labels=None):
        """The `Quality` of samples x, (n, *shape), n of any size from 5 on.

        labels: the class that each was asked to be of, (n,).
        """
        return self._quality(x, x, labels)

    def of_data(self, n):
        """The `Quality` of real data, which samples can reach.

        n training samples are compared with held-out ones. The other figures are of the
        held-out ones, because a training sample is its own nearest.
        """
        labels = self.data.held_labels
        return self._quality(self.data.train[:n], self.data.held[:n],
                             None if labels is None else labels[:n])

    def _quality(self, compared, x, labels):
        """The accuracy is of `compared`, beside as many held-out samples; the rest of x."""
        held = self.data.held
        n = min(len(compared), len(held))
        accuracy, error = svm_accuracy(compared[:n], held[:n], show=self.show)
        nearest = nearest_distance(x, self.data.train, show=self.show)
        if self.classify is None:
            return Quality(accuracy, error, nearest)
        probabilities = self.classify(x)
        # high too where all samples are of one class: the SVM's accuracy sees that
        clear = share_of(probabilities.max(1) >= CLEAR)
        named = () if labels is None else share_of(probabilities.argmax(1) == labels)
        return Quality(accuracy, error, nearest, *clear, *named)
