package uploader

import "time"

// RetainConfig configures role retain.
type RetainConfig struct {
	// Concurrency is how many VMs are worked on at once.
	Concurrency int `koanf:"concurrency" help:"tasks in work at once"`
	// Parallel is how many requests are in flight per VM.
	Parallel int `koanf:"parallel" help:"requests in flight per VM"`
	// StepDeletes bounds the objects that one step deletes, Steps the steps of one task. What is left, the next task does.
	StepDeletes int `koanf:"step_deletes" help:"objects that one step deletes at most"`
	Steps       int `koanf:"steps" help:"steps of one task at most"`
	// StepTimeout bounds one step.
	StepTimeout time.Duration `koanf:"step_timeout" help:"bound of one step"`
	// OrphanAge is how old, by storage time, an object has to be that nothing names, besides being an orphan by the rules.
	OrphanAge time.Duration `koanf:"orphan_age" help:"least age of an orphan that is deleted"`
	// RetryDelay is the pause before the task of a lost worker comes again; it doubles up to ten times as much.
	RetryDelay time.Duration `koanf:"retry_delay" help:"pause before the task of a lost worker comes again"`
}

func defaultRetain() RetainConfig {
	return RetainConfig{
		Concurrency: 2, Parallel: 4, StepDeletes: 1000, Steps: 50, StepTimeout: 15 * time.Minute, OrphanAge: time.Hour, RetryDelay: 5 * time.Second,
	}
}

// validate reports every problem to check, which takes whether it is right, the key and what is wrong.
func (c RetainConfig) validate(check func(ok bool, key, format string, args ...any)) {
	positive := func(key string, v int64) { check(v > 0, "retain."+key, "%d, want more than 0", v) }
	positive("concurrency", int64(c.Concurrency))
	check(c.Parallel >= 1 && c.Parallel <= 64, "retain.parallel", "%d, want 1 to 64", c.Parallel)
	positive("step_deletes", int64(c.StepDeletes))
	positive("steps", int64(c.Steps))
	positive("step_timeout", int64(c.StepTimeout))
	positive("orphan_age", int64(c.OrphanAge))
	positive("retry_delay", int64(c.RetryDelay))
}
