"""How good are samples? Two figures that a human can read."""

import numpy as np


def svm_accuracy(x, held, folds=5):
    """Five-fold accuracy of an RBF SVM that tells x from held-out data: .5 is perfect.

    x, held: (n, ...) arrays of equal n. Returns (mean, standard error over the folds).
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.svm import SVC
    points = np.concatenate((x, held)).reshape(len(x) + len(held), -1)
    is_sample = np.arange(len(points)) < len(x)
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    accuracy = cross_val_score(SVC(), points, is_sample, cv=split)
    return accuracy.mean(), accuracy.std(ddof=1) / folds**.5


def nearest_distance(x, train):
    """Median over x of the distance to the nearest training sample.

    x, train: arrays of samples, (n, ...) and (m, ...). A median far below that of held-out
    data means that the network memorised its training samples.
    """
    from sklearn.neighbors import NearestNeighbors
    train = train.reshape(len(train), -1)
    x = x.reshape(len(x), -1)
    nearest = NearestNeighbors(n_neighbors=1).fit(train)
    distances, _ = nearest.kneighbors(x)
    return float(np.median(distances))
