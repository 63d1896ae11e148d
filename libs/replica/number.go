package replica

import "fmt"

// The sequence number of a page blob (rule 20): A·2²⁰ + (T − A). The blob holds manifest A, and pages of (A, T] may
// have been written; T = A is "at rest".
const (
	stepBits = 20
	maxStep  = 1<<stepBits - 1
)

func joinNumber(a, t Seq) int64 { return int64(a)<<stepBits | int64(t-a) }

func splitNumber(n int64) (a, t Seq) {
	a = Seq(n >> stepBits)
	return a, a + Seq(n&maxStep)
}

// checkNumber refuses a number that this code never writes for a chain with that head.
func checkNumber(n int64, head Seq) error {
	if a, t := splitNumber(n); n < 0 || t > head {
		return fmt.Errorf("page blob says %d going to %d, head is %d: %w", a, t, head, ErrCorrupt)
	}
	return nil
}
