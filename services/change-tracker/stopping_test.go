package changetracker

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/testkit"
	changetrackerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/changetracker/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// A call that comes while the tracker stops must not hear that the machine is gone: the scheduler would stop its
// replication for good. Nor may anything be attached any more that nobody would end.
func TestStoppingIsNotGone(t *testing.T) {
	h := newHost(t)
	ctx := testkit.Context(t)
	require.NoError(t, h.service.tracker.Close())
	_, err := h.client.GetTracking(ctx, &changetrackerv1.GetTrackingRequest{Vm: testVM})
	require.Equal(t, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, errcat.Reason(err), "%v", err)
	_, err = h.client.AttachMachine(ctx, &changetrackerv1.AttachMachineRequest{Vm: testVM, StateDir: h.dir, Disks: h.disks})
	require.Equal(t, typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE, errcat.Reason(err), "%v", err)
}
