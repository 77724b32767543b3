from sb3_mrq.zoo.cli import main

if __name__ == "__main__":
    main()
