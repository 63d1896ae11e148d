package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/landfall-dr/landfall/services/host-provider/qmp"
)

var errUnbuilt = errors.New("not built")

func (h *held) prepareJobs(ctx context.Context, m *qmp.Monitor) error { return errUnbuilt }

func (h *held) instantOfJobs(ctx context.Context, m *qmp.Monitor, disks []int, bitmaps []any) (time.Time, time.Duration, error) {
	return time.Time{}, 0, fmt.Errorf("jobs: %w", errUnbuilt)
}
