"""`python -m fusemega`: the same as the `fusemega` command, and what every rank of a launcher runs."""

from fusemega.cli import main

if __name__ == "__main__":
    main()
