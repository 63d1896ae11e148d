package failoverorchestrator_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Clean-up does not claim to have removed what it did not find: the folder may be on another machine, or its marker gone.
func TestCleanUpSaysWhatItDidNotFind(t *testing.T) {
	g := newRig(t)
	g.start(g.store, true)
	for name, spoil := range map[string]func(out string){
		"removed nothing":   func(out string) { require.NoError(t, os.Remove(filepath.Join(out, ".landfall-failover.json"))) },
		"nothing to remove": func(out string) { require.NoError(t, os.Rename(out, out+"-elsewhere")) },
	} {
		out := filepath.Join(t.TempDir(), "drill")
		g.test(request(out, latest()))
		g.await(ready)
		spoil(out)
		cleanup := g.cleanUp()
		g.await(clean)
		job := g.job(cleanup.Name)
		require.Equal(t, typesv1.JobState_JOB_STATE_SUCCEEDED, job.State)
		require.Contains(t, job.Steps[0].Detail, name)
		require.Contains(t, job.Steps[0].Detail, out)
	}
}
