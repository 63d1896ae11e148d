package replica

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
