// Runs one of the kernels of faults.cu: its name, and 0 or 1 for the fault.
int main(int, char** words) {
    const std::string name = words[1];
    const int fault = atoi(words[2]), count = 63;
    std::vector<float> values(count, 1.0f), out(name == "missing_barrier" ? 64 : count);
    const char* error = host::launch(1, 64, [&] {
#define RUN(kernel) \
    if (name == #kernel) kernel(values.data(), count, fault, out.data())
        RUN(out_of_bounds);
        RUN(missing_barrier);
        RUN(divergent_barrier);
        RUN(divergent_shuffle);
        RUN(overflow);
    });
    if (error) {
        fprintf(stderr, "%s\n", error);
        return 3;
    }
    puts("ok");
}
