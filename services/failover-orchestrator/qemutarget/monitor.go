package qemutarget

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/qmp"
)

// answerTime bounds one command; a screenshot of a loaded machine is the slowest.
const answerTime = 20 * time.Second

// errStranger is a monitor that answers with another machine's UUID.
var errStranger = errors.New("the monitor is another machine's")

// monitor is one connection to QEMU's monitor, for one caller, for a moment: QEMU serves one client at a time.
type monitor struct{ *qmp.Monitor }

// dialMonitor connects to the machine in dir and proves that it is the one with this UUID.
func dialMonitor(ctx context.Context, dir, id string) (*monitor, error) {
	conn, err := dial(ctx, dir, MonitorSocket)
	if err != nil {
		return nil, err
	}
	q, err := qmp.New(ctx, conn, filepath.Join(dir, MonitorSocket))
	if err != nil {
		return nil, err
	}
	m := &monitor{q}
	var answer struct {
		UUID string `json:"UUID"`
	}
	if err = m.do(ctx, "query-uuid", nil, &answer); err == nil && !strings.EqualFold(answer.UUID, id) {
		err = errStranger
	}
	if err != nil {
		m.close()
		return nil, fmt.Errorf("QEMU's monitor: %w", err)
	}
	return m, nil
}

// do executes a command.
func (m *monitor) do(ctx context.Context, command string, args, result any) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	return m.Execute(ctx, command, args, result)
}

func (m *monitor) close() { _ = m.Close() }

// status is the machine's run state, for example "running" or "io-error".
func (m *monitor) status(ctx context.Context) (string, error) {
	var answer struct {
		Status string `json:"status"`
	}
	err := m.do(ctx, "query-status", nil, &answer)
	return answer.Status, err
}
