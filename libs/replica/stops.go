package replica

// isStop reports whether a checkpoint belongs at entries[i] before anything above it is applied (I13): it ends a run
// of partials, it is the last state before a run, or the policy wants it. Only what the entries up to the next data
// manifest say matters, so a redo of a batch sees the same stops.
func isStop(entries []Entry, i int, policy func(Entry) bool) bool {
	e := entries[i]
	if !e.Kind.IsPoint() && e.Kind != KindRewind {
		return false
	}
	for j := i - 1; j >= 0 && entries[j].Seq == entries[j+1].Seq-1; j-- {
		if k := entries[j].Kind; k == KindPartial {
			return true
		} else if !k.IsFence() {
			break
		}
	}
	for j := i + 1; j < len(entries); j++ {
		if k := entries[j].Kind; k == KindPartial {
			return true
		} else if !k.IsFence() {
			break
		}
	}
	return policy != nil && policy(e)
}

// batchEnd returns the index of the last manifest of a batch that begins at entries[from]: the next stop, or where
// a bound is reached.
func batchEnd(entries []Entry, from, last int, maxBytes int64, policy func(Entry) bool) int {
	var bytes int64
	for i := from; i < last; i++ {
		bytes += entries[i].Bytes
		if entries[i].Kind.IsFence() {
			continue // disks never rest at a fence
		}
		if isStop(entries, i, policy) || i-from+1 >= maxBatchManifests || bytes+entries[i+1].Bytes > maxBytes {
			return i
		}
	}
	return last
}

// maxBatchManifests bounds a batch; far below the step the number can hold.
const maxBatchManifests = 4096
