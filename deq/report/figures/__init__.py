"""The figures of a report, one file a kind; :mod:`deq.report.figures.style` is what they share."""
