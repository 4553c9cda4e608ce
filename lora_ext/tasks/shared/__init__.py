"""Code that several tasks share.

- Files: ``run_directory``, a run's results; ``whole_files`` and ``journal``, which a killed process leaves whole;
  ``package_files``, of packages that the demos read; ``hub``, models by id.
- Processes: ``team``, those of one run; ``sigterm``.
- Figures: ``measuring``, ``run_figures``, ``provenance``, ``markdown``.
"""
