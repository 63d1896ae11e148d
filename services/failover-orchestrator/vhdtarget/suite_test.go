package vhdtarget_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/targettest"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

var options = targettest.Options{New: func() (target.Target, error) { return vhdtarget.Target{}, nil }, Kills: 16}

func TestMain(m *testing.M) {
	targettest.Child(options)
	goleak.VerifyTestMain(m)
}

func TestConformance(t *testing.T) { targettest.Run(t, options) }
