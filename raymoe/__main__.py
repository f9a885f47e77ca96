from raymoe.cli import main

main()
